//! The server: what `s3s-fs` has, and what it lacks: that of two who put one key *if nothing is there* only one is first;
//! folders, and lists that come in pages.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::dto::{
    CommonPrefix, DeleteObjectInput, DeleteObjectOutput, DeleteObjectsInput, DeleteObjectsOutput,
    DeletedObject, GetObjectInput, GetObjectOutput, HeadObjectInput, HeadObjectOutput,
    ListObjectsV2Input, ListObjectsV2Output, PutObjectInput, PutObjectOutput,
};
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tokio::sync::{Mutex, oneshot};

/// The one bucket there is.
pub const BUCKET: &str = "bucket";
/// Who may use it.
pub const ACCESS_KEY: &str = "AKTESTONLY";
/// What they sign with.
pub const SECRET_KEY: &str = "not-a-secret-0123456789";

/// A server that runs. Dropping it ends it, and all that it has is gone.
#[derive(Debug)]
pub struct Server {
    files: tempfile::TempDir,
    address: SocketAddr,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// One with an empty bucket.
    ///
    /// # Panics
    /// If it cannot be started: then there is nothing to be tested.
    pub fn start() -> Self {
        Self::start_with(Conditions::Kept)
    }

    /// One that does not look at `If-None-Match`, as some do not.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start_without_conditions() -> Self {
        Self::start_with(Conditions::Ignored)
    }

    fn start_with(conditions: Conditions) -> Self {
        let files = tempfile::tempdir().unwrap();
        std::fs::create_dir(files.path().join(BUCKET)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let objects = Bucket {
            files: FileSystem::new(files.path()).unwrap(),
            root: files.path().to_owned(),
            conditions,
            one_at_a_time: Mutex::new(()),
        };
        let service = {
            let mut builder = S3ServiceBuilder::new(objects);
            builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
            builder.build().into_shared()
        };
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
        let listener = listener.unwrap();
        let address = listener.local_addr().unwrap();
        let (end, mut ended) = oneshot::channel();
        let thread = thread::spawn(move || {
            runtime.block_on(async move {
                loop {
                    let socket = tokio::select! {
                        accepted = listener.accept() => accepted,
                        _ = &mut ended => return,
                    };
                    // Who has gone again before is not served.
                    let Ok((socket, _)) = socket else { continue };
                    // Or each answer waits for the client's word that it has the head.
                    let _ = socket.set_nodelay(true);
                    let service = service.clone();
                    tokio::spawn(async move {
                        let http = Builder::new(TokioExecutor::new());
                        // Who hangs up in the middle is no concern of the server's.
                        let _ = http.serve_connection(TokioIo::new(socket), service).await;
                    });
                }
            });
            runtime.shutdown_background();
        });
        Self {
            files,
            address,
            end: Some(end),
            thread: Some(thread),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same as clients want it.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The file of an object, whether it is there or not.
    pub fn file(&self, key: &str) -> PathBuf {
        self.files.path().join(BUCKET).join(key)
    }

    /// The objects that there are, by key.
    ///
    /// # Panics
    /// If they cannot be looked at.
    pub fn keys(&self) -> Vec<String> {
        let bucket = self.file("");
        let mut keys = Vec::new();
        let mut folders = vec![bucket.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => keys.push(key_of(&bucket, &path)),
                }
            }
        }
        keys.sort();
        keys
    }
}

fn key_of(bucket: &Path, path: &Path) -> String {
    path.strip_prefix(bucket)
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned()
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                ended.is_ok() || thread::panicking(),
                "the server has panicked"
            );
        }
    }
}

/// Whether a put may have a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Conditions {
    Kept,
    Ignored,
}

/// The files, and what is between a look and a put.
#[derive(Debug)]
struct Bucket {
    files: FileSystem,
    root: PathBuf,
    conditions: Conditions,
    one_at_a_time: Mutex<()>,
}

/// The most that is listed at once, so that there is a next time.
const PAGE: usize = 3;

/// Of all that is `listed` what was asked for, and so much of it as fits.
fn page(input: &ListObjectsV2Input, listed: &mut ListObjectsV2Output) {
    let prefix = input.prefix.clone().unwrap_or_default();
    let after = input
        .continuation_token
        .as_ref()
        .or(input.start_after.as_ref());
    let after = after.cloned().unwrap_or_default();
    let (mut objects, mut folders) = (Vec::new(), Vec::<String>::new());
    let mut last = None;
    listed.is_truncated = Some(false);
    for object in listed.contents.take().unwrap_or_default() {
        let Some(key) = object.key.clone() else {
            continue;
        };
        let Some(rest) = key.strip_prefix(&prefix) else {
            continue;
        };
        let delimiter = input.delimiter.as_deref().unwrap_or("\0");
        let folder = rest
            .split_once(delimiter)
            .map(|(name, _)| format!("{prefix}{name}{delimiter}"));
        // A folder is before all that is in it, and so is what is listed of it.
        let shown = folder.clone().unwrap_or_else(|| key.clone());
        if shown <= after
            || folders
                .last()
                .is_some_and(|last| Some(last) == folder.as_ref())
        {
            continue;
        }
        if objects.len() + folders.len() == PAGE {
            listed.is_truncated = Some(true);
            listed.next_continuation_token = last;
            break;
        }
        last = Some(shown);
        match folder {
            Some(folder) => folders.push(folder),
            None => objects.push(object),
        }
    }
    listed.key_count = i32::try_from(objects.len() + folders.len()).ok();
    listed.max_keys = i32::try_from(PAGE).ok();
    listed.contents = Some(objects);
    let prefixes = folders.into_iter().map(|prefix| CommonPrefix {
        prefix: Some(prefix),
    });
    listed.common_prefixes = Some(prefixes.collect());
    listed.delimiter.clone_from(&input.delimiter);
    listed.prefix.clone_from(&input.prefix);
}

#[async_trait::async_trait]
impl S3 for Bucket {
    async fn put_object(
        &self,
        mut put: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let condition = put.input.if_none_match.take();
        if self.conditions == Conditions::Ignored || condition.is_none() {
            return self.files.put_object(put).await;
        }
        let _alone = self.one_at_a_time.lock().await;
        let file = self.root.join(&put.input.bucket).join(&put.input.key);
        match file.exists() {
            true => Err(s3_error!(PreconditionFailed)),
            false => self.files.put_object(put).await,
        }
    }

    async fn get_object(
        &self,
        get: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        self.files.get_object(get).await
    }

    async fn head_object(
        &self,
        look: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        self.files.head_object(look).await
    }

    async fn list_objects_v2(
        &self,
        list: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = list.input.clone();
        // Of all there are, since what it makes of prefixes is not what they are.
        let all = list.map_input(|list| ListObjectsV2Input {
            prefix: None,
            delimiter: None,
            start_after: None,
            continuation_token: None,
            ..list
        });
        let mut listed = self.files.list_objects_v2(all).await?;
        page(&input, &mut listed.output);
        Ok(listed)
    }

    async fn delete_object(
        &self,
        delete: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.files.delete_object(delete).await
    }

    async fn delete_objects(
        &self,
        delete: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let keys: Vec<_> = delete
            .input
            .delete
            .objects
            .iter()
            .map(|object| object.key.clone())
            .collect();
        let mut deleted = self.files.delete_objects(delete).await?;
        // What was not there is not there.
        let gone = keys.into_iter().map(|key| DeletedObject {
            key: Some(key),
            ..DeletedObject::default()
        });
        deleted.output.deleted = Some(gone.collect());
        Ok(deleted)
    }
}
