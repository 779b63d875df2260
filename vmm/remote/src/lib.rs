//! Kept snapshots in object stores: `s3://`, `gs://` and `az://` by URL.
//!
//! What a store of objects is, how it is read and how it is written is the business of [`palimpsest_store`]; this crate
//! is what is behind its [`Objects`], by the crate [`object_store`]: requests, tries, timeouts, credentials. It is a
//! crate of its own so that nobody builds an HTTP client who wants none.
//!
//! ```no_run
//! use palimpsest_store::{Cache, Store};
//! use palimpsest_remote::{Options, locate, open};
//!
//! let (url, name) = locate("s3://bucket/snaps/warm")?;
//! let store = Store::open_objects(&url, open(&url, &Options::default())?)?;
//! let cache = Cache::open("/var/cache/snaps".as_ref(), 8 << 30)?;
//! let kept = store.with_cache(cache.into()).read(&name)?;
//! let mut region = vec![0; 2 << 20];
//! kept.region(0, &mut region)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - **Credentials** are those of [`object_store`]: `AWS_*`, `GOOGLE_*`, `AZURE_*` in the environment, or what the host
//!   of a cloud gives its machines. They are in no URL, and in no error.
//! - **Every operation ends**: each request has a time, each operation a number of tries and a time for all of them, and
//!   whoever has set [`Options::stop`] waits for nothing. What went wrong for good is not tried again.
//! - There is no type of a runtime in what is public: a thread runs the requests, and whoever wants something done waits
//!   for it, from whatever thread, of a runtime or not.
//!
//! | file | concept |
//! |---|---|
//! | `place` | URLs, and what they are opened with |
//! | `remote` | operations on objects, tried as often as makes sense |
//! | `runner` | the thread that runs them |
//! | `words` | what went wrong, in words |

#![forbid(unsafe_code)]

mod place;
mod remote;
mod runner;
mod words;

pub use self::place::{Options, RemoteError, is_url, locate, open};
#[cfg(doc)]
use palimpsest_store::Objects;
