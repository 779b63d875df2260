//! A run's trace (`vmm --trace`), as far as it is drawn: what each thread did when.

use serde_json::Value;

/// What a thread did, in microseconds since the run began.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Span {
    pub(crate) name: String,
    pub(crate) begin: f64,
    pub(crate) end: f64,
}

/// A thread, and what it did, the outer before the inner.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Thread {
    pub(crate) name: String,
    pub(crate) spans: Vec<Span>,
}

/// The threads of a trace; none if `file` is no trace.
pub(crate) fn threads(file: &Value) -> Option<Vec<Thread>> {
    let mut threads: Vec<(u64, Thread)> = Vec::new();
    for event in file.get("traceEvents")?.as_array()? {
        let tid = event.get("tid")?.as_u64()?;
        let name = |value: &Value| Some(value.get("name")?.as_str()?.to_owned());
        let known = threads.iter_mut().find(|(number, _)| *number == tid);
        match (event.get("ph")?.as_str()?, known) {
            ("M", None) => threads.push((
                tid,
                Thread {
                    name: name(event.get("args")?)?,
                    spans: Vec::new(),
                },
            )),
            ("X", Some((_, thread))) => {
                let begin = event.get("ts")?.as_f64()?;
                thread.spans.push(Span {
                    name: name(event)?,
                    begin,
                    end: begin + event.get("dur")?.as_f64()?,
                });
            }
            // Other kinds of events are not drawn.
            _ => {}
        }
    }
    let mut threads: Vec<Thread> = threads.into_iter().map(|(_, thread)| thread).collect();
    for thread in &mut threads {
        let order = |a: &Span, b: &Span| a.begin.total_cmp(&b.begin).then(b.end.total_cmp(&a.end));
        thread.spans.sort_by(order);
    }
    Some(threads)
}

/// The snapshot whose pause was the median: when its vCPUs were told to park, and when the last ran again.
pub(crate) fn typical_pause(threads: &[Thread]) -> Option<(f64, f64)> {
    let spans = || threads.iter().flat_map(|thread| &thread.spans);
    let named = |name: &'static str| move |span: &&Span| span.name == name;
    let mut pauses: Vec<(f64, f64)> = spans()
        .filter(named("snapshot"))
        .filter_map(|snapshot| {
            let of_it = |name| {
                let within =
                    |span: &&Span| span.begin >= snapshot.begin && span.end <= snapshot.end;
                spans().filter(named(name)).find(within)
            };
            Some((of_it("park")?.begin, of_it("resume")?.end))
        })
        .collect();
    pauses.sort_by(|a, b| (a.1 - a.0).total_cmp(&(b.1 - b.0)));
    pauses.get(pauses.len() / 2).copied()
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// Three snapshots, whose pauses are of 300, 100 and 200 us.
    pub(crate) fn example() -> Value {
        let mut events = vec![
            json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": "vcpu0"}}),
            json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": 2, "args": {"name": "main"}}),
        ];
        let mut span = |tid: u64, name: &str, begin: f64, took: f64| {
            events.push(json!({
                "name": name, "ph": "X", "pid": 1, "tid": tid, "ts": begin, "dur": took, "args": {},
            }));
        };
        for (at, pause) in [(1000.0, 300.0), (3000.0, 100.0), (5000.0, 200.0)] {
            // The inner end first, and are written first.
            span(2, "park", at + 50.0, pause / 2.0);
            span(2, "resume", at + 50.0 + pause / 2.0, pause / 2.0);
            span(2, "snapshot", at, 500.0);
            span(1, "parked", at + 60.0, pause - 20.0);
            span(1, "fault", at + 600.0, 40.0);
        }
        json!({"traceEvents": events})
    }

    #[test]
    fn threads_have_their_spans_the_outer_first() {
        let threads = threads(&example()).unwrap();
        let names: Vec<&str> = threads.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["vcpu0", "main"]);
        let first = &threads[1].spans[..3];
        assert_eq!(
            first.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
            ["snapshot", "park", "resume"]
        );
        assert_eq!((first[0].begin, first[0].end), (1000.0, 1500.0));
    }

    #[test]
    fn the_typical_pause_is_the_median() {
        let threads = threads(&example()).unwrap();
        assert_eq!(typical_pause(&threads), Some((5050.0, 5250.0)));
        assert_eq!(typical_pause(&threads[..1]), None);
    }

    #[test]
    fn what_is_no_trace_has_no_threads() {
        for file in [json!({}), json!({"traceEvents": [{"ph": "X"}]}), json!([1])] {
            assert_eq!(threads(&file), None, "{file}");
        }
    }
}
