//! What a run did when, as a timeline for a person to look at: `--trace`.
//!
//! The file has the format of Chrome's traces, which <https://ui.perfetto.dev> and `chrome://tracing` open: a
//! row for each thread, on it what [`palimpsest::timeline`] says, and what the checker does. Events are kept
//! in memory until the run is over, by thread, so that to write them disturbs nothing that they are about.

use std::cell::OnceCell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Subscriber, debug};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Events that are kept of a thread: what there is time for in hours.
const MOST_EVENTS: usize = 1 << 20;

/// What threads have done since it was made.
#[derive(Clone, Debug)]
pub(super) struct Timeline(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    began: Instant,
    rows: Mutex<Vec<Arc<Mutex<Row>>>>,
}

/// What one thread has done.
#[derive(Debug)]
struct Row {
    thread: String,
    events: Vec<Event>,
    lost: u64,
}

#[derive(Debug)]
struct Event {
    name: &'static str,
    began: Duration,
    took: Duration,
    arguments: Arguments,
}

/// The values of a span.
#[derive(Clone, Debug, Default)]
struct Arguments(Vec<(&'static str, u64)>);

/// When a span was last entered.
struct Entered(Instant);

thread_local! {
    /// This thread's row. There is one timeline a process.
    static ROW: OnceCell<Arc<Mutex<Row>>> = const { OnceCell::new() };
}

impl Timeline {
    pub(super) fn new() -> Self {
        Self(Arc::new(Shared {
            began: Instant::now(),
            rows: Mutex::default(),
        }))
    }

    fn note(&self, event: Event) {
        ROW.with(|row| {
            let row = row.get_or_init(|| {
                let row = Arc::new(Mutex::new(Row {
                    thread: thread::current().name().unwrap_or("?").to_owned(),
                    events: Vec::new(),
                    lost: 0,
                }));
                lock(&self.0.rows).push(Arc::clone(&row));
                row
            });
            let mut row = lock(row);
            if row.events.len() < MOST_EVENTS {
                row.events.push(event);
            } else {
                row.lost += 1;
            }
        });
    }

    /// The file, as JSON.
    pub(super) fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        let mut events = Vec::new();
        for (tid, row) in (1..).zip(&*lock(&self.0.rows)) {
            let row = lock(row);
            if row.lost > 0 {
                debug!(thread = row.thread, lost = row.lost, "the trace is full");
            }
            events.push(Line::Name {
                name: "thread_name",
                ph: 'M',
                pid: 1,
                tid,
                args: ThreadName {
                    name: row.thread.clone(),
                },
            });
            events.extend(row.events.iter().map(|event| Line::Complete {
                name: event.name,
                ph: 'X',
                pid: 1,
                tid,
                ts: micros(event.began),
                dur: micros(event.took),
                args: event.arguments.clone(),
            }));
        }
        serde_json::to_vec(&File {
            trace_events: events,
        })
    }
}

/// Microseconds, the unit of the format.
fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Timeline {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut arguments = Arguments::default();
            attributes.record(&mut arguments);
            span.extensions_mut().insert(arguments);
        }
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            span.extensions_mut().replace(Entered(Instant::now()));
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let now = Instant::now();
        let Some(span) = context.span(id) else {
            return;
        };
        let extensions = span.extensions();
        if let Some(Entered(entered)) = extensions.get() {
            self.note(Event {
                name: span.name(),
                began: entered.saturating_duration_since(self.0.began),
                took: now.saturating_duration_since(*entered),
                arguments: extensions.get().cloned().unwrap_or_default(),
            });
        }
    }
}

impl Visit for Arguments {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.push((field.name(), value));
    }

    /// There are no others in a timeline.
    fn record_debug(&mut self, _field: &Field, _value: &dyn std::fmt::Debug) {}
}

impl Serialize for Arguments {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

/// The file: "Trace Event Format", JSON object format.
#[derive(Serialize)]
struct File {
    #[serde(rename = "traceEvents")]
    trace_events: Vec<Line>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Line {
    /// A thread has this name.
    Name {
        name: &'static str,
        ph: char,
        pid: u32,
        tid: usize,
        args: ThreadName,
    },
    /// Something that began and ended.
    Complete {
        name: &'static str,
        ph: char,
        pid: u32,
        tid: usize,
        ts: f64,
        dur: f64,
        args: Arguments,
    },
}

#[derive(Serialize)]
struct ThreadName {
    name: String,
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use tracing::trace_span;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn spans_are_events_on_the_row_of_their_thread() {
        let timeline = Timeline::new();
        let subscriber = tracing_subscriber::registry().with(timeline.clone());
        tracing::subscriber::with_default(subscriber, || {
            let outer = trace_span!("outer").entered();
            trace_span!("inner", snapshot = 7u64).in_scope(|| ());
            drop(outer);
        });
        let file: Value = serde_json::from_slice(&timeline.to_json().unwrap()).unwrap();
        let events = file["traceEvents"].as_array().unwrap();
        let [row, inner, outer] = &events[..] else {
            panic!("{events:?}")
        };
        let thread = "cli::timeline::tests::spans_are_events_on_the_row_of_their_thread";
        assert_eq!(
            (&row["ph"], &row["args"]["name"]),
            (&"M".into(), &thread.into())
        );
        assert_eq!(
            (&inner["name"], &inner["ph"]),
            (&"inner".into(), &"X".into())
        );
        assert_eq!(inner["args"]["snapshot"], 7);
        let number = |value: &Value| value.as_f64().unwrap();
        assert!(number(&outer["ts"]) <= number(&inner["ts"]));
        assert!(number(&outer["dur"]) >= number(&inner["dur"]));
        assert!(events.iter().all(|event| event["tid"] == 1));
    }
}
