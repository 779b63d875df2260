//! What a run did when, as a timeline for a person to look at: `--trace`.
//!
//! The file has the format of Chrome's traces, which <https://ui.perfetto.dev> and `chrome://tracing` open: a
//! row for each thread, on it what [`palimpsest::timeline`] says, and what the checker does. Events are kept
//! in memory until the run is over, by thread, so that to write them disturbs nothing that they are about.

use std::cell::OnceCell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};
use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Events that are kept of a thread, of 64 bytes each and more. At a hundred snapshots a second there is time
/// for that many faults in some minutes; whoever wants to see more sees too much.
const MOST_EVENTS: usize = 1 << 19;

/// What threads have done since it was made.
#[derive(Clone, Debug)]
pub(super) struct Timeline(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    began: Instant,
    rows: Mutex<Vec<Arc<Mutex<ThreadRow>>>>,
}

/// What one thread has done.
#[derive(Debug)]
struct ThreadRow {
    thread: String,
    events: Vec<TraceEvent>,
    lost: u64,
}

#[derive(Debug)]
struct TraceEvent {
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
    static ROW: OnceCell<Arc<Mutex<ThreadRow>>> = const { OnceCell::new() };
}

impl Timeline {
    pub(super) fn new() -> Self {
        Self(Arc::new(Shared {
            began: Instant::now(),
            rows: Mutex::default(),
        }))
    }

    fn note(&self, event: TraceEvent) {
        ROW.with(|row| {
            let row = row.get_or_init(|| {
                let row = Arc::new(Mutex::new(ThreadRow {
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

    /// The file, as JSON, and how many events are not in it, for want of room.
    pub(super) fn to_json(&self) -> (serde_json::Result<Vec<u8>>, u64) {
        let rows = lock(&self.0.rows);
        let lost = rows.iter().map(|row| lock(row).lost).sum();
        (serde_json::to_vec(&TraceFile(&rows)), lost)
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
            self.note(TraceEvent {
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
struct TraceFile<'a>(&'a [Arc<Mutex<ThreadRow>>]);

/// What threads have done, one after the other.
struct TraceEvents<'a>(&'a [Arc<Mutex<ThreadRow>>]);

impl Serialize for TraceFile<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map([("traceEvents", TraceEvents(self.0))])
    }
}

impl Serialize for TraceEvents<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut events = serializer.serialize_seq(None)?;
        for (tid, row) in (1..).zip(self.0) {
            let row = lock(row);
            events.serialize_element(&EventRecord::Name {
                name: "thread_name",
                ph: 'M',
                pid: 1,
                tid,
                args: ThreadName { name: &row.thread },
            })?;
            for event in &row.events {
                events.serialize_element(&EventRecord::Complete {
                    name: event.name,
                    ph: 'X',
                    pid: 1,
                    tid,
                    ts: micros(event.began),
                    dur: micros(event.took),
                    args: &event.arguments,
                })?;
            }
        }
        events.end()
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum EventRecord<'a> {
    /// A thread has this name.
    Name {
        name: &'static str,
        ph: char,
        pid: u32,
        tid: usize,
        args: ThreadName<'a>,
    },
    /// Something that began and ended.
    Complete {
        name: &'static str,
        ph: char,
        pid: u32,
        tid: usize,
        ts: f64,
        dur: f64,
        args: &'a Arguments,
    },
}

#[derive(Serialize)]
struct ThreadName<'a> {
    name: &'a str,
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
        let file: Value = serde_json::from_slice(&timeline.to_json().0.unwrap()).unwrap();
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

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let timeline = Timeline::new();
        let subscriber = tracing_subscriber::registry().with(timeline.clone());
        tracing::subscriber::with_default(subscriber, || {
            trace_span!("first").in_scope(|| ());
            let row = Arc::clone(&lock(&timeline.0.rows)[0]);
            let event = || TraceEvent {
                name: "more",
                began: Duration::ZERO,
                took: Duration::ZERO,
                arguments: Arguments::default(),
            };
            lock(&row).events.resize_with(MOST_EVENTS, event);
            for _ in 0..3 {
                trace_span!("too many").in_scope(|| ());
            }
        });
        let (json, lost) = timeline.to_json();
        assert_eq!(lost, 3);
        let json = String::from_utf8(json.unwrap()).unwrap();
        assert!(json.contains("more") && !json.contains("too many"));
    }
}
