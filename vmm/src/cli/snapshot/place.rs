//! Where a snapshot is: a directory, or a URL, and what is needed to reach that.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use palimpsest::kept::store::{Cache, Kept, SnapshotName, Store, StoreError};

use crate::cli::Failure;
use crate::cli::screen::Screen;
use crate::cli::units::{parse_size, parse_time};
use palimpsest::causes::chain;

/// How a store by URL is reached.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ReachArgs {
    /// How long each object of a store by URL is tried for before it is given up
    #[arg(
        long,
        value_name = "TIME",
        default_value = "60s",
        value_parser = parse_time,
        help_heading = "Stores by URL"
    )]
    remote_timeout: Duration,

    /// Reach a store by URL without encryption, if its endpoint is http://
    #[arg(long, help_heading = "Stores by URL")]
    allow_http: bool,
}

/// Where chunks of stores by URL are kept.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct CacheArgs {
    /// Where chunks of stores by URL are kept once they were read [default: palimpsest/chunks in the user's cache
    /// directory]
    #[arg(long, value_name = "DIR", help_heading = "Stores by URL")]
    cache: Option<PathBuf>,

    /// The most that is kept there; 0 keeps nothing
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "8G",
        value_parser = parse_size,
        help_heading = "Stores by URL"
    )]
    cache_size: u64,
}

/// Why a place cannot be had that is no directory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    /// Its URL is none, or it cannot be reached.
    #[cfg(feature = "remote")]
    #[error(transparent)]
    Remote(#[from] palimpsest_remote::RemoteError),
    /// This program knows no URLs.
    #[cfg(not(feature = "remote"))]
    #[error("`{}` is a URL, and this program was built without those (feature `remote`)", path.display())]
    NotBuilt {
        /// The URL.
        path: PathBuf,
    },
    /// Nobody says where caches are.
    #[error(
        "there is no place for the cache of what is read, as neither XDG_CACHE_HOME nor HOME says where: say --cache \
         DIR, or --cache-size 0 to keep nothing"
    )]
    NoCaches,
    /// The cache cannot be had.
    #[error(
        "cannot keep what is read: say --cache DIR for another place, or --cache-size 0 to keep nothing"
    )]
    Cache(#[source] StoreError),
}

impl PlaceError {
    /// Whether another command line is what helps.
    pub(crate) fn is_usage(&self) -> bool {
        match self {
            #[cfg(feature = "remote")]
            Self::Remote(error) => {
                use palimpsest_remote::RemoteError::{Settings, Thread};
                !matches!(error, Settings { .. } | Thread(_))
            }
            #[cfg(not(feature = "remote"))]
            Self::NotBuilt { .. } => true,
            Self::NoCaches => true,
            Self::Cache(_) => false,
        }
    }
}

/// Whether `path` is a URL.
pub(crate) fn is_url(path: &Path) -> bool {
    // What has no characters is none.
    path.to_str().is_some_and(|path| path.contains("://"))
}

/// What is needed to open places of either kind.
#[derive(Debug)]
pub(crate) struct Places<'a> {
    reach: &'a ReachArgs,
    /// `None` if nothing that is read is to be kept.
    keep: Option<&'a CacheArgs>,
    stop: Arc<AtomicBool>,
    cache: OnceCell<Arc<Cache>>,
}

impl<'a> Places<'a> {
    /// Without a cache. What goes on ends when `stop` is set.
    pub(crate) fn new(reach: &'a ReachArgs, stop: Arc<AtomicBool>) -> Self {
        Self {
            reach,
            keep: None,
            stop,
            cache: OnceCell::new(),
        }
    }

    /// The same, with a cache.
    pub(crate) fn with_cache(self, keep: &'a CacheArgs) -> Self {
        Self {
            keep: Some(keep),
            ..self
        }
    }

    /// The store at `path`.
    pub(crate) fn store(&self, path: &Path) -> Result<Store, Failure> {
        let store = match is_url(path) {
            false => return Ok(Store::open(path)?),
            true => self.by_url(path, Store::open_objects)?,
        };
        Ok(match self.cache()? {
            Some(cache) => store.with_cache(cache),
            None => store,
        })
    }

    /// The same, which is made if there is nothing.
    pub(crate) fn store_or_new(&self, path: &Path) -> Result<Store, Failure> {
        match is_url(path) {
            false => Ok(Store::open_or_create(path)?),
            true => self.by_url(path, Store::open_or_create_objects),
        }
    }

    /// The snapshot at `STORE/NAME`.
    pub(crate) fn read(&self, path: &Path) -> Result<Kept, Failure> {
        let (store, name) = locate(path)?;
        Ok(self.store(&store)?.read(&name)?)
    }

    /// Says if nothing more could be kept of what was read.
    pub(crate) fn tell_trouble(&self, screen: &Screen) {
        let cache = self.cache.get();
        if let Some((cache, trouble)) = cache.and_then(|cache| Some((cache, cache.trouble()?))) {
            screen.line(&format!(
                "nothing more was kept in the cache {}: {}",
                cache.path().display(),
                chain(trouble)
            ));
        }
    }

    fn cache(&self) -> Result<Option<Arc<Cache>>, PlaceError> {
        let Some(args) = self.keep.filter(|args| args.cache_size > 0) else {
            return Ok(None);
        };
        if let Some(cache) = self.cache.get() {
            return Ok(Some(Arc::clone(cache)));
        }
        let path = args.cache.clone().or_else(Cache::default_path);
        let cache = Cache::open(&path.ok_or(PlaceError::NoCaches)?, args.cache_size);
        let cache = Arc::new(cache.map_err(PlaceError::Cache)?);
        Ok(Some(Arc::clone(self.cache.get_or_init(|| cache))))
    }

    #[cfg(feature = "remote")]
    fn by_url(
        &self,
        path: &Path,
        open: fn(&str, Arc<dyn palimpsest::kept::store::Objects>) -> Result<Store, StoreError>,
    ) -> Result<Store, Failure> {
        let options = palimpsest_remote::Options {
            patience: self.reach.remote_timeout,
            allow_http: self.reach.allow_http,
            stop: Arc::clone(&self.stop),
            ..palimpsest_remote::Options::default()
        };
        let url = path.to_string_lossy();
        let url = url.trim_end_matches('/');
        let objects = palimpsest_remote::open(url, &options).map_err(PlaceError::from)?;
        Ok(open(url, objects)?)
    }

    #[cfg(not(feature = "remote"))]
    fn by_url(
        &self,
        path: &Path,
        _open: fn(&str, Arc<dyn palimpsest::kept::store::Objects>) -> Result<Store, StoreError>,
    ) -> Result<Store, Failure> {
        let _ = (self.reach, &self.stop);
        let path = path.to_owned();
        Err(PlaceError::NotBuilt { path }.into())
    }
}

/// The store and the name in it that `STORE/NAME` is.
pub(crate) fn locate(path: &Path) -> Result<(PathBuf, SnapshotName), Failure> {
    #[cfg(feature = "remote")]
    if is_url(path) {
        let url = path.to_string_lossy();
        let (store, name) = palimpsest_remote::locate(&url).map_err(PlaceError::from)?;
        return Ok((store.into(), name));
    }
    #[cfg(not(feature = "remote"))]
    if is_url(path) {
        let path = path.to_owned();
        return Err(PlaceError::NotBuilt { path }.into());
    }
    Ok(palimpsest::kept::store::locate(path)?)
}
