//! Operations on objects, tried as often as makes sense.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload,
};
use palimpsest_store::{Listing, Objects, Piece};

use crate::place::Options;
use crate::runner::Runner;
use crate::words::words;

/// The longest wait between two tries.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Objects below a prefix of a bucket.
#[derive(Debug)]
pub(crate) struct Remote {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    options: Options,
    runner: Runner,
}

/// Why a try came to nothing.
enum Failed {
    Store(Error),
    /// There was no answer in that time.
    Time(Duration),
    /// An answer makes no sense.
    Answer(String),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Store(error)
    }
}

impl Failed {
    /// Whether it may be another time the next time.
    fn is_passing(&self) -> bool {
        !matches!(
            self,
            Self::Store(
                Error::NotFound { .. }
                    | Error::InvalidPath { .. }
                    | Error::NotSupported { .. }
                    | Error::AlreadyExists { .. }
                    | Error::Precondition { .. }
                    | Error::NotModified { .. }
                    | Error::NotImplemented { .. }
                    | Error::PermissionDenied { .. }
                    | Error::Unauthenticated { .. }
                    | Error::UnknownConfigurationKey { .. }
            )
        )
    }

    /// The same for the host's kind of errors, after so many tries.
    fn into_io(self, tries: u32, elapsed: Duration) -> io::Error {
        let kind = match &self {
            Self::Store(Error::NotFound { .. }) => io::ErrorKind::NotFound,
            Self::Store(Error::PermissionDenied { .. } | Error::Unauthenticated { .. }) => {
                io::ErrorKind::PermissionDenied
            }
            Self::Time(_) => io::ErrorKind::TimedOut,
            _ => io::ErrorKind::Other,
        };
        let why = match &self {
            Self::Store(error) => words(error),
            Self::Time(time) => format!("no answer in {} s", time.as_secs_f64()),
            Self::Answer(what) => what.clone(),
        };
        let text = match kind {
            io::ErrorKind::PermissionDenied => {
                format!(
                    "{why} (the credentials in the environment are none, or may not read, write and list there)"
                )
            }
            _ if tries > 1 => format!(
                "{why} (tried {tries} times in {:.1} s: it may go on later, from where it is)",
                elapsed.as_secs_f64()
            ),
            _ => why,
        };
        io::Error::new(kind, text)
    }
}

impl Remote {
    pub(crate) fn new(
        store: Arc<dyn ObjectStore>,
        prefix: Path,
        options: Options,
    ) -> io::Result<Self> {
        Ok(Self {
            store,
            prefix,
            options,
            runner: Runner::start()?,
        })
    }

    fn path(&self, key: &str) -> io::Result<Path> {
        let key = Path::parse(key);
        let key = key.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(self.prefix.parts().chain(key.parts()).collect())
    }

    /// Does `operation` until it is done, it makes no sense to go on, or it was called off.
    fn try_it<T, F>(
        &self,
        operation: impl Fn(Arc<dyn ObjectStore>) -> F + Send + 'static,
    ) -> io::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failed>> + Send,
    {
        let (store, options) = (Arc::clone(&self.store), self.options.clone());
        let tries = async move {
            let began = Instant::now();
            let mut wait = options.first_wait;
            let mut tried = 0;
            loop {
                let left = options.patience.saturating_sub(began.elapsed());
                let time = options.request_timeout.min(left.max(options.first_wait));
                let done = tokio::time::timeout(time, operation(Arc::clone(&store))).await;
                tried += 1;
                let failed = match done {
                    Ok(Ok(done)) => return Ok(done),
                    Ok(Err(failed)) => failed,
                    Err(_) => Failed::Time(time),
                };
                let is_over = began.elapsed() + wait >= options.patience;
                if !failed.is_passing() || tried >= options.tries.max(1) || is_over {
                    return Err(failed.into_io(tried, began.elapsed()));
                }
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        };
        self.runner.run(tries, &self.options.stop)?
    }
}

/// `None` if there is none.
fn found<T>(done: io::Result<T>) -> io::Result<Option<T>> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        done => done.map(Some),
    }
}

/// The rest of a path below a folder.
fn below(folder: &Path, path: &Path) -> Option<String> {
    let rest: Path = path.prefix_match(folder)?.collect();
    (!rest.as_ref().is_empty()).then(|| rest.to_string())
}

async fn get(store: &dyn ObjectStore, path: &Path, range: Range<u64>) -> Result<Piece, Failed> {
    let options = GetOptions {
        range: Some(GetRange::Bounded(range.clone())),
        ..GetOptions::default()
    };
    let got = match store.get_opts(path, options).await {
        Ok(got) => got,
        // There is nothing in that range, which is no error here.
        Err(error) if error.to_string().contains("416") => {
            let len = store.head(path).await?.size;
            return match len <= range.start {
                true => Ok(Piece {
                    bytes: Vec::new(),
                    len,
                }),
                false => Err(error.into()),
            };
        }
        Err(error) => return Err(error.into()),
    };
    let len = got.meta.size;
    let wanted = range.end.min(len).saturating_sub(range.start);
    let mut bytes = Vec::with_capacity(wanted as usize);
    let mut stream = got.into_stream();
    while let Some(some) = stream.next().await {
        let some = some?;
        // Whatever the other side says: no more is taken than was asked for.
        if (bytes.len() + some.len()) as u64 > wanted {
            let what = format!("the answer has more than the {wanted} bytes that it says");
            return Err(Failed::Answer(what));
        }
        bytes.extend_from_slice(&some);
    }
    match bytes.len() as u64 == wanted {
        true => Ok(Piece { bytes, len }),
        false => Err(Failed::Answer(format!(
            "the answer ends after {} of {wanted} bytes",
            bytes.len()
        ))),
    }
}

impl Objects for Remote {
    fn get(&self, key: &str, range: Range<u64>) -> io::Result<Option<Piece>> {
        let path = self.path(key)?;
        found(self.try_it(move |store| {
            let (path, range) = (path.clone(), range.clone());
            async move { get(&*store, &path, range).await }
        }))
    }

    fn len(&self, key: &str) -> io::Result<Option<u64>> {
        let path = self.path(key)?;
        found(self.try_it(move |store| {
            let path = path.clone();
            async move { Ok(store.head(&path).await?.size) }
        }))
    }

    fn put(&self, key: &str, bytes: &[u8]) -> io::Result<()> {
        let (path, payload) = (self.path(key)?, PutPayload::from(bytes.to_vec()));
        self.try_it(move |store| {
            let (path, payload) = (path.clone(), payload.clone());
            async move {
                store.put(&path, payload).await?;
                Ok(())
            }
        })
    }

    fn put_new(&self, key: &str, bytes: &[u8]) -> io::Result<bool> {
        let (path, payload) = (self.path(key)?, PutPayload::from(bytes.to_vec()));
        self.try_it(move |store| {
            let (path, payload) = (path.clone(), payload.clone());
            async move {
                let options = PutOptions::from(PutMode::Create);
                match store.put_opts(&path, payload, options).await {
                    Ok(_) => Ok(true),
                    Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(false),
                    Err(error) => Err(error.into()),
                }
            }
        })
    }

    fn delete(&self, key: &str) -> io::Result<()> {
        let path = self.path(key)?;
        let deleted = self.try_it(move |store| {
            let path = path.clone();
            async move { Ok(store.delete(&path).await?) }
        });
        found(deleted).map(drop)
    }

    fn list(&self, folder: &str) -> io::Result<Listing> {
        let path = self.path(folder)?;
        let in_it = path.clone();
        let listed = self.try_it(move |store| {
            let path = path.clone();
            async move { Ok(store.list_with_delimiter(Some(&path)).await?) }
        })?;
        let folders = listed.common_prefixes.iter();
        let mut folders: Vec<_> = folders.filter_map(|path| below(&in_it, path)).collect();
        folders.sort_unstable();
        Ok(Listing {
            folders,
            objects: sizes(&in_it, &listed.objects),
        })
    }

    fn list_below(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        let path = self.path(folder)?;
        let in_it = path.clone();
        let listed = self.try_it(move |store| {
            let path = path.clone();
            async move { Ok(store.list(Some(&path)).try_collect::<Vec<_>>().await?) }
        })?;
        Ok(sizes(&in_it, &listed))
    }
}

/// Objects below a folder, in order, and the bytes of each.
fn sizes(folder: &Path, objects: &[ObjectMeta]) -> Vec<(String, u64)> {
    let objects = objects.iter();
    let sizes = objects.filter_map(|object| Some((below(folder, &object.location)?, object.size)));
    let mut sizes: Vec<_> = sizes.collect();
    sizes.sort_unstable();
    sizes
}
