//! URLs, and what they are opened with.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{ClientConfigKey, ObjectStore, RetryConfig};
use palimpsest_store::{NameError, Objects, SnapshotName};
use url::Url;

use crate::remote::Remote;
use crate::words::words;

/// How objects are reached.
#[derive(Clone)]
pub struct Options {
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// How long a request may take, from its beginning to the last byte of its answer: 4 MiB at most, but what is put.
    pub request_timeout: Duration,
    /// How long an operation is tried for, which may be several requests of the same.
    pub patience: Duration,
    /// How often it is tried, at least once.
    pub tries: u32,
    /// How long is waited before the second try; before each further one twice as long as before, up to 5 s.
    pub first_wait: Duration,
    /// Whether an endpoint may be one without TLS, `http://`. Otherwise only `AWS_ALLOW_HTTP=true` and the like say so.
    pub allow_http: bool,
    /// Settings beside those of the environment, by the names of its variables: `AWS_ENDPOINT` and the like.
    pub settings: Vec<(String, String)>,
    /// When this is set all that goes on ends within some hundredths of a second, as called off.
    pub stop: Arc<AtomicBool>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(30),
            patience: Duration::from_secs(60),
            tries: 8,
            first_wait: Duration::from_millis(100),
            allow_http: false,
            settings: Vec::new(),
            stop: Arc::default(),
        }
    }
}

/// Without the settings: there may be credentials among them.
impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("connect_timeout", &self.connect_timeout)
            .field("request_timeout", &self.request_timeout)
            .field("patience", &self.patience)
            .field("tries", &self.tries)
            .field("first_wait", &self.first_wait)
            .field("allow_http", &self.allow_http)
            .finish_non_exhaustive()
    }
}

/// Why a URL cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// It is no URL.
    #[error("`{url}` is no URL")]
    NoUrl {
        /// What it is.
        url: String,
        /// Why not.
        source: url::ParseError,
    },
    /// It is of something that is not known here.
    #[error(
        "`{url}` is nothing that is known here: s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH (a directory \
         is written without a scheme)"
    )]
    Scheme {
        /// The URL.
        url: String,
    },
    /// It has more than a bucket and a path. It is not shown: it may have a password in it.
    #[error(
        "a URL of a store has a bucket and a path, and nothing before `@`, behind `?` or behind `#`: credentials are in \
         the environment ({environment})"
    )]
    More {
        /// Where credentials are.
        environment: &'static str,
    },
    /// There is no name at its end.
    #[error(transparent)]
    Name(#[from] NameError),
    /// It would be reached without TLS, and nobody has allowed that.
    #[error(
        "{endpoint} is not encrypted: whoever is on the way can read what is in a guest's memory; if that is as it \
         should be, say --allow-http or AWS_ALLOW_HTTP=true"
    )]
    Http {
        /// Where it would be reached.
        endpoint: String,
    },
    /// What the environment says of it makes no sense.
    #[error("cannot reach {url} with what the environment says ({environment}): {why}")]
    Settings {
        /// The URL.
        url: String,
        /// Which part of the environment.
        environment: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The host gives no thread for it.
    #[error("cannot start a thread for requests")]
    Thread(#[source] io::Error),
}

/// Whether `path` is written as a URL, of a known kind or not.
pub fn is_url(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.contains("://"))
}

/// The URL of the store and the name in it that `URL/NAME` is.
///
/// # Errors
/// If there is no name at its end.
pub fn locate(url: &str) -> Result<(String, SnapshotName), RemoteError> {
    let (store, name) = url.rsplit_once('/').unwrap_or(("", url));
    // What has no bucket has no name in it, either.
    let is_in_bucket = store
        .split_once("://")
        .is_some_and(|(_, at)| !at.is_empty());
    let name = if is_in_bucket { name } else { url };
    Ok((store.to_owned(), name.parse()?))
}

/// The kinds of stores, by the schemes of their URLs.
#[derive(Clone, Copy, Debug)]
enum Kind {
    S3,
    Google,
    Azure,
}

impl Kind {
    fn environment(self) -> &'static str {
        match self {
            Self::S3 => "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT",
            Self::Google => "GOOGLE_SERVICE_ACCOUNT, GOOGLE_APPLICATION_CREDENTIALS",
            Self::Azure => "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
        }
    }
}

/// The objects that are at `url`, and below it. Nothing is asked yet.
///
/// # Errors
/// See [`RemoteError`].
pub fn open(url: &str, options: &Options) -> Result<Arc<dyn Objects>, RemoteError> {
    let of = |source| RemoteError::NoUrl {
        url: url.to_owned(),
        source,
    };
    let scheme = || RemoteError::Scheme { url: shown(url) };
    let parsed = Url::parse(url).map_err(of)?;
    let kind = match parsed.scheme() {
        "s3" => Kind::S3,
        "gs" => Kind::Google,
        "az" => Kind::Azure,
        _ => return Err(scheme()),
    };
    let environment = kind.environment();
    let is_more = !parsed.username().is_empty()
        || parsed.password().is_some()
        || parsed.query().is_some()
        || parsed.fragment().is_some()
        || parsed.port().is_some();
    if is_more {
        return Err(RemoteError::More { environment });
    }
    let bucket = parsed.host_str().filter(|host| !host.is_empty());
    let bucket = bucket.ok_or_else(scheme)?;
    let settings = |error: object_store::Error| RemoteError::Settings {
        url: url.to_owned(),
        environment,
        why: words(&error),
    };
    let prefix = object_store::path::Path::from_url_path(parsed.path());
    let prefix = prefix.map_err(|error| settings(error.into()))?;
    // Another part of this process may have chosen one: then it is that one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let store = build(kind, bucket, options).map_err(|error| match error {
        BuildError::Http(endpoint) => RemoteError::Http { endpoint },
        BuildError::Store(error) => settings(error),
    })?;
    let remote = Remote::new(store, prefix, options.clone()).map_err(RemoteError::Thread)?;
    Ok(Arc::new(remote))
}

/// As much of what is no URL of a store as can be shown.
fn shown(url: &str) -> String {
    url.split("://")
        .next()
        .map_or_else(String::new, |scheme| format!("{scheme}://..."))
}

enum BuildError {
    /// The endpoint that is without TLS.
    Http(String),
    Store(object_store::Error),
}

impl From<object_store::Error> for BuildError {
    fn from(error: object_store::Error) -> Self {
        Self::Store(error)
    }
}

/// The settings that a kind of store knows, as it does those of the environment.
fn known<K: FromStr>(settings: &[(String, String)]) -> impl Iterator<Item = (K, &str)> {
    settings
        .iter()
        .filter_map(|(name, value)| Some((name.to_ascii_lowercase().parse().ok()?, value.as_str())))
}

fn build(kind: Kind, bucket: &str, options: &Options) -> Result<Arc<dyn ObjectStore>, BuildError> {
    // Whoever sees what an operation is tries it again: a request alone does not know.
    let once = RetryConfig {
        max_retries: 0,
        retry_timeout: options.patience,
        ..RetryConfig::default()
    };
    let millis = |time: Duration| format!("{}ms", time.as_millis().max(1));
    let mut client = vec![
        (
            ClientConfigKey::ConnectTimeout,
            millis(options.connect_timeout),
        ),
        (ClientConfigKey::Timeout, millis(options.request_timeout)),
    ];
    if options.allow_http {
        client.push((ClientConfigKey::AllowHttp, "true".to_owned()));
    }
    let store: Arc<dyn ObjectStore> = match kind {
        Kind::S3 => {
            let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
            for (key, value) in known(&options.settings) {
                builder = builder.with_config(key, value);
            }
            for (key, value) in client {
                builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
            }
            let of = |key| builder.get_config_value(&key);
            let is_allowed = of(AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp));
            let endpoint = of(AmazonS3ConfigKey::Endpoint).unwrap_or_default();
            if endpoint.starts_with("http://") && is_allowed.as_deref() != Some("true") {
                return Err(BuildError::Http(endpoint));
            }
            Arc::new(builder.with_retry(once).build()?)
        }
        Kind::Google => {
            let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
            for (key, value) in known(&options.settings) {
                builder = builder.with_config(key, value);
            }
            for (key, value) in client {
                builder = builder.with_config(GoogleConfigKey::Client(key), value);
            }
            Arc::new(builder.with_retry(once).build()?)
        }
        Kind::Azure => {
            let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket);
            for (key, value) in known(&options.settings) {
                builder = builder.with_config(key, value);
            }
            for (key, value) in client {
                builder = builder.with_config(AzureConfigKey::Client(key), value);
            }
            Arc::new(builder.with_retry(once).build()?)
        }
    };
    Ok(store)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_behind_the_last_slash() {
        let (url, name) = locate("s3://bucket/a/b/warm").unwrap();
        assert_eq!((url.as_str(), name.as_str()), ("s3://bucket/a/b", "warm"));
        let (url, name) = locate("az://container/warm").unwrap();
        assert_eq!((url.as_str(), name.as_str()), ("az://container", "warm"));
        for url in [
            "s3://bucket",
            "s3://",
            "s3://bucket/a/",
            "s3://bucket/chunks",
            "warm",
        ] {
            let located = locate(url);
            assert!(located.is_err() || url == "warm", "{url}: {located:?}");
        }
        assert!(is_url("s3://b/x".as_ref()) && is_url("ftp://b".as_ref()));
        assert!(!is_url("snaps/warm".as_ref()) && !is_url("/s3:/b".as_ref()));
    }

    #[test]
    fn what_is_no_url_of_a_store_is_refused() {
        for url in [
            "ftp://b/x",
            "http://b/x",
            "file:///x",
            "s3:///x",
            "s3:b",
            "x",
        ] {
            let error = open(url, &Options::default()).unwrap_err();
            let is_right = matches!(
                error,
                RemoteError::Scheme { .. } | RemoteError::NoUrl { .. }
            );
            assert!(is_right, "{url}: {error}");
        }
        for url in [
            "s3://k:secret@b/x",
            "s3://b/x?secret",
            "gs://b/x#secret",
            "az://b:80/x",
        ] {
            let error = open(url, &Options::default()).unwrap_err();
            assert!(matches!(error, RemoteError::More { .. }), "{url}: {error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn what_is_not_encrypted_must_be_allowed() {
        let settings = |allowed: &str| Options {
            settings: [
                ("AWS_ENDPOINT", "http://127.0.0.1:1"),
                ("AWS_ALLOW_HTTP", allowed),
                ("AWS_ACCESS_KEY_ID", "key"),
                ("AWS_SECRET_ACCESS_KEY", "hush"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
            ..Options::default()
        };
        let error = open("s3://b/x", &settings("false")).unwrap_err();
        assert!(matches!(error, RemoteError::Http { .. }), "{error}");
        open("s3://b/x", &settings("true")).unwrap();
        let options = Options {
            allow_http: true,
            ..settings("false")
        };
        open("s3://b/x", &options).unwrap();
        assert!(!format!("{options:?}").contains("hush"));
    }

    #[test]
    fn each_kind_of_store_can_be_opened() {
        let of = |pairs: &[(&str, &str)]| Options {
            settings: pairs
                .iter()
                .map(|(a, b)| (a.to_string(), b.to_string()))
                .collect(),
            ..Options::default()
        };
        let azure = [
            ("AZURE_STORAGE_ACCOUNT_NAME", "a"),
            ("AZURE_STORAGE_ACCOUNT_KEY", "aGk="),
        ];
        open("az://container/snaps", &of(&azure)).unwrap();
        let google = [("GOOGLE_SKIP_SIGNATURE", "true")];
        open("gs://bucket/snaps", &of(&google)).unwrap();
        let wrong = [("GOOGLE_SERVICE_ACCOUNT_KEY", "{ not json")];
        let error = open("gs://bucket/snaps", &of(&wrong)).unwrap_err();
        assert!(error.to_string().contains("GOOGLE_"), "{error}");
    }
}
