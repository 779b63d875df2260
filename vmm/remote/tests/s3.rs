//! Stores by URL, on a real S3 server on loopback, and with faults between: connections that are cut, answers that are
//! lost, cut off or wrong, servers that refuse or say nothing. Whatever happens: nothing is there under a final name that
//! is not whole, no wrong byte is handed out, and what was cut can be done again.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use palimpsest_remote::{Options, open};
use palimpsest_store::{
    Cache, Copied, CopyOptions, Facts, Hash, Part, SaveOptions, Saving, SnapshotName, Store,
    StoreError, copy, prune, verify,
};
use s3_server::{BUCKET, Fault, Faults, Request, Server, environment};

const REGION: u64 = 2 << 20;

type MakeFault = fn() -> Fault;

fn name(name: &str) -> SnapshotName {
    name.parse().unwrap()
}

fn url() -> String {
    format!("s3://{BUCKET}/snaps")
}

/// Of a server at `endpoint`, with little patience.
fn options(endpoint: &str) -> Options {
    Options {
        settings: environment(endpoint),
        tries: 3,
        first_wait: Duration::from_millis(1),
        ..Options::default()
    }
}

fn remote(endpoint: &str) -> Result<Store, StoreError> {
    remote_with(&options(endpoint))
}

fn remote_with(options: &Options) -> Result<Store, StoreError> {
    Store::open_objects(&url(), open(&url(), options).unwrap())
}

/// A directory with snapshots of a region and a bit: `warm`, and `other`, which has the region in common with it.
struct Local {
    _dir: tempfile::TempDir,
    store: Store,
    regions: Vec<u64>,
}

fn content(region: u64, seed: u8) -> Vec<u8> {
    match region {
        // The same in both.
        0 => (0..REGION as u32)
            .map(|n| (n / 4096 % 7) as u8 * 31)
            .collect(),
        _ => vec![seed; 8192],
    }
}

impl Local {
    fn new() -> Self {
        Self::of(&[0, 1])
    }

    /// Without what is large, where it is pushed a hundred times.
    fn small() -> Self {
        Self::of(&[1])
    }

    fn of(regions: &[u64]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_create(&dir.path().join("store")).unwrap();
        for (named, seed) in [("warm", 1), ("other", 2)] {
            let memory = REGION + 8192;
            let saving = Saving::begin(&store, &name(named), memory, SaveOptions::default());
            let mut saving = saving.unwrap();
            for region in regions {
                saving.region(*region, &content(*region, seed)).unwrap();
            }
            let part = Part {
                name: "vcpu/0".to_owned(),
                version: 1,
                bytes: vec![seed; 100],
            };
            saving.finish(Facts::default(), &[part]).unwrap();
        }
        let regions = regions.to_vec();
        Self {
            _dir: dir,
            store,
            regions,
        }
    }

    fn hash(&self, named: &str) -> Hash {
        self.store.read(&name(named)).unwrap().hash()
    }

    fn push(&self, named: &str, options: &Options) -> Result<Copied, StoreError> {
        self.push_with(named, options, 1)
    }

    fn push_with(
        &self,
        named: &str,
        options: &Options,
        at_once: usize,
    ) -> Result<Copied, StoreError> {
        let to = Store::open_or_create_objects(&url(), open(&url(), options).unwrap())?;
        let copying = CopyOptions {
            at_once: NonZeroUsize::new(at_once).unwrap(),
            ..CopyOptions::default()
        };
        copy(
            &self.store.read(&name(named))?,
            &to,
            &name("there"),
            copying,
            &mut |_| true,
        )
    }

    fn is_unharmed(&self) {
        for named in ["warm", "other"] {
            let verified = verify(
                &self.store,
                &name(named),
                &mut HashSet::new(),
                &mut |_, _| true,
            );
            assert!(verified.unwrap().wrong.is_empty());
        }
    }
}

/// Reads all of what is there.
fn read(store: &Store) -> Result<(Hash, Vec<Vec<u8>>), StoreError> {
    let kept = store.read(&name("there"))?;
    let mut regions = Vec::new();
    for region in 0..kept.index().regions() {
        let mut content = vec![0; kept.index().region_bytes(region) as usize];
        kept.region(region, &mut content)?;
        regions.push(content);
    }
    Ok((kept.hash(), regions))
}

/// Nothing is on the server by the name that is not whole. Which snapshot it is.
fn whole_or_not_there(server: &Server, local: &Local, what: &str) -> Option<Hash> {
    if !server.file("snaps/there/snapshot.json").exists() {
        return None;
    }
    let (hash, regions) = read(&remote(&server.endpoint()).unwrap())
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    let seed = if hash == local.hash("warm") { 1 } else { 2 };
    assert!(
        seed == 1 || hash == local.hash("other"),
        "{what}: it is nobody's"
    );
    for region in &local.regions {
        assert!(
            regions[*region as usize] == content(*region, seed),
            "{what}"
        );
    }
    Some(hash)
}

fn remove(server: &Server) {
    std::fs::remove_dir_all(server.file("snaps")).unwrap();
}

#[test]
fn a_store_by_url_is_a_store() {
    let (server, local) = (Server::start(), Local::new());
    let options = options(&server.endpoint());
    let error = remote_with(&options).unwrap_err();
    assert!(matches!(error, StoreError::NoStore { .. }), "{error}");
    let pushed = local.push_with("warm", &options, 8).unwrap();
    assert_eq!((pushed.chunks, pushed.sent), (2, 2));
    let keys = server.keys();
    assert_eq!(keys.len(), 6, "{keys:?}");
    let store = remote_with(&options).unwrap();
    assert_eq!(store.names().unwrap(), [name("there")]);
    let listed = palimpsest_store::list(&store).unwrap();
    let (_, usage) = listed[0].found.as_ref().unwrap();
    assert_eq!((usage.bytes, usage.missing), (REGION + 8192, 0));
    let verified = verify(&store, &name("there"), &mut HashSet::new(), &mut |_, _| {
        true
    })
    .unwrap();
    assert_eq!((verified.read, verified.wrong.len()), (2, 0));
    assert_eq!(read(&store).unwrap().0, local.hash("warm"));

    // And back, into a directory.
    let dir = tempfile::tempdir().unwrap();
    let back = Store::open_or_create(&dir.path().join("back")).unwrap();
    let kept = store.read(&name("there")).unwrap();
    let copied = copy(
        &kept,
        &back,
        &name("back"),
        CopyOptions::default(),
        &mut |_| true,
    )
    .unwrap();
    assert_eq!(copied.sent, 2);
    assert_eq!(back.read(&name("back")).unwrap().hash(), local.hash("warm"));

    prune(&store, &[name("there")], Duration::ZERO).unwrap();
    assert!(store.names().unwrap().is_empty());
    let again = local.push("warm", &options).unwrap();
    assert_eq!((again.sent, again.was_there), (0, false));
}

#[test]
fn each_request_of_a_push_cut_lost_or_refused() {
    let (server, local) = (Server::start(), Local::small());
    let faults = Faults::start(server.address(), |_| Fault::None);
    let options = options(&faults.endpoint());
    let kinds: [(&str, MakeFault); 5] = [
        ("cut", || Fault::Cut),
        ("cut after", || Fault::CutAfter),
        ("500", || Fault::Status(500)),
        ("503", || Fault::Status(503)),
        ("cut off", || Fault::Truncated(1)),
    ];
    for (kind, fault) in kinds {
        for at in 0.. {
            let first = faults.requests().len() as u64;
            faults.decide(move |request| match request.number == first + at {
                true => fault(),
                false => Fault::None,
            });
            let pushed = local.push("warm", &options);
            let what = format!("{kind} at request {at}");
            let requests = faults.requests().len() as u64 - first;
            if requests <= at {
                assert!(at > 15, "{what}: that is too few requests");
                break;
            }
            // One fault is nothing that another try does not mend.
            pushed.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(
                whole_or_not_there(&server, &local, &what).is_some(),
                "{what}"
            );
            remove(&server);
        }
    }
    local.is_unharmed();
}

#[test]
fn a_push_that_is_cut_for_good_goes_on_where_it_was() {
    let (server, local) = (Server::start(), Local::new());
    let faults = Faults::start(server.address(), |_| Fault::None);
    let options = options(&faults.endpoint());
    let mut sent = HashSet::new();
    for fault in [|| Fault::Cut, || Fault::CutAfter] as [MakeFault; 2] {
        for at in 0.. {
            let first = faults.requests().len() as u64;
            faults.decide(move |request| match request.number >= first + at {
                true => fault(),
                false => Fault::None,
            });
            let pushed = local.push("warm", &options);
            if (faults.requests().len() as u64) - first <= at {
                pushed.unwrap();
                break;
            }
            let what = format!("from request {at} on");
            let error = pushed.unwrap_err();
            let text = chain(&error);
            assert!(
                text.contains(&url()) && text.contains("tried 3 times"),
                "{what}: {text}"
            );
            assert!(!text.contains(s3_server::SECRET_KEY), "{text}");
            whole_or_not_there(&server, &local, &what);
            faults.decide(|_| Fault::None);
            sent.insert(local.push("warm", &options).unwrap().sent);
            assert!(whole_or_not_there(&server, &local, &what).is_some());
            remove(&server);
        }
    }
    assert_eq!(sent.len(), 3, "chunks are not found again: {sent:?}");
    local.is_unharmed();
}

#[test]
fn each_request_of_a_load_cut_off_or_wrong() {
    let (server, local) = (Server::start(), Local::new());
    local.push("warm", &options(&server.endpoint())).unwrap();
    let right = read(&remote(&server.endpoint()).unwrap()).unwrap();
    let faults = Faults::start(server.address(), |_| Fault::None);
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = 0;
    let kinds: [(&str, MakeFault); 7] = [
        ("cut", || Fault::Cut),
        ("cut after", || Fault::CutAfter),
        ("500", || Fault::Status(500)),
        ("cut off", || Fault::Truncated(20)),
        ("cut off late", || Fault::Truncated(1 << 20)),
        ("wrong", || Fault::Wrong(3)),
        ("wrong late", || Fault::Wrong(8000)),
    ];
    for (kind, fault) in kinds {
        for at in 0.. {
            let first = faults.requests().len() as u64;
            faults.decide(move |request| match request.number == first + at {
                true => fault(),
                false => Fault::None,
            });
            let cache = Cache::open(&dir.path().join(format!("{kind} {at}")), 1 << 30).unwrap();
            let cache = Arc::new(cache);
            let of = |endpoint: &str| Ok(remote(endpoint)?.with_cache(Arc::clone(&cache)));
            let found = of(&faults.endpoint()).and_then(|store: Store| read(&store));
            let what = format!("{kind} at request {at}");
            if (faults.requests().len() as u64) - first <= at {
                assert!(at >= 6, "{what}");
                break;
            }
            match found {
                Ok(found) => assert!(found == right, "{what}: wrong bytes were handed out"),
                // What is wrong is wrong whoever asks again.
                Err(error) => {
                    assert!(kind.starts_with("wrong"), "{what}: {error}");
                    let text = chain(&error);
                    assert!(text.contains("snaps"), "{what}: {text}");
                    wrong += 1;
                }
            }
            // The cache has nothing wrong.
            let found = of(&server.endpoint())
                .and_then(|store: Store| read(&store))
                .unwrap();
            assert!(found == right, "{what}: the cache is harmed");
            assert_eq!(cache.counts().damaged, 0, "{what}");
        }
    }
    assert!(wrong >= 7, "{wrong}");
}

#[test]
fn each_request_of_a_pull_refused_for_good() {
    let (server, local) = (Server::start(), Local::new());
    local.push("warm", &options(&server.endpoint())).unwrap();
    let faults = Faults::start(server.address(), |_| Fault::None);
    let dir = tempfile::tempdir().unwrap();
    let back = Store::open_or_create(&dir.path().join("back")).unwrap();
    let copying = CopyOptions {
        at_once: NonZeroUsize::MIN,
        ..CopyOptions::default()
    };
    for at in 0.. {
        let first = faults.requests().len() as u64;
        faults.decide(move |request| match request.number >= first + at {
            true => Fault::Cut,
            false => Fault::None,
        });
        let pulled = remote(&faults.endpoint()).and_then(|store| {
            copy(
                &store.read(&name("there"))?,
                &back,
                &name("back"),
                copying,
                &mut |_| true,
            )
        });
        if (faults.requests().len() as u64) - first <= at {
            let pulled = pulled.unwrap();
            // What came before the last was cut is not fetched again.
            assert_eq!((pulled.done, pulled.sent), (2, 1), "at {at}");
            break;
        }
        pulled.unwrap_err();
        assert!(back.names().unwrap().is_empty());
    }
    assert_eq!(back.read(&name("back")).unwrap().hash(), local.hash("warm"));
}

#[test]
fn what_is_refused_is_not_asked_for_again() {
    let (server, local) = (Server::start(), Local::new());
    let faults = Faults::start(server.address(), |_| Fault::Status(403));
    let error = local
        .push("warm", &options(&faults.endpoint()))
        .unwrap_err();
    // It may ask in another way, but nothing twice.
    let requests = faults.requests();
    let asked: HashSet<_> = requests.iter().map(|r| (&r.method, &r.path)).collect();
    assert!(
        asked.len() == requests.len() && asked.len() <= 2,
        "{requests:?}"
    );
    let text = chain(&error);
    assert!(
        text.contains("credentials") && text.contains("403"),
        "{text}"
    );
    // The same by the server itself, which says more to who asks for the bytes than to who asks how many they are.
    let mut wrong = options(&server.endpoint());
    for (variable, value) in &mut wrong.settings {
        if variable == "AWS_SECRET_ACCESS_KEY" {
            *value = "another".to_owned();
        }
    }
    let text = chain(&local.push("warm", &wrong).unwrap_err());
    assert!(
        text.contains("credentials") && text.contains("403"),
        "{text}"
    );
    assert!(!text.contains("another"), "{text}");
    assert!(server.keys().is_empty());
}

#[test]
fn a_server_that_is_gone_is_an_end() {
    let (server, local) = (Server::start(), Local::new());
    let options = options(&server.endpoint());
    local.push("warm", &options).unwrap();
    let store = remote_with(&options).unwrap();
    let kept = store.read(&name("there")).unwrap();
    drop(server);
    let mut content = vec![0; REGION as usize];
    let error = kept.region(0, &mut content).unwrap_err();
    let text = chain(&error);
    for part in [
        "s3://bucket/snaps/chunks/",
        "tried 3 times",
        "Connection refused",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(error.is_of_host(), "{text}");
}

#[test]
fn a_server_that_says_nothing_is_an_end() {
    let server = Server::start();
    let faults = Faults::start(server.address(), |_| Fault::Never);
    let options = Options {
        request_timeout: Duration::from_millis(50),
        tries: 2,
        ..options(&faults.endpoint())
    };
    let text = chain(&remote_with(&options).unwrap_err());
    assert!(text.contains("tried 2 times"), "{text}");
    assert_eq!(faults.requests().len(), 2);
    // All tries together have a time, too.
    let options = Options {
        patience: Duration::from_millis(20),
        tries: 1000,
        ..options
    };
    remote_with(&options).unwrap_err();
    assert!(faults.requests().len() < 40);
}

#[test]
fn what_is_called_off_ends_while_the_server_says_nothing() {
    let (server, local) = (Server::start(), Local::new());
    local.push("warm", &options(&server.endpoint())).unwrap();
    let (came, has_come) = mpsc::channel();
    let faults = Faults::start(server.address(), move |request: &Request| {
        match request.is_of("GET", "snaps/chunks/") {
            true => {
                came.send(()).unwrap();
                Fault::Never
            }
            false => Fault::None,
        }
    });
    let stop = Arc::new(AtomicBool::new(false));
    let options = Options {
        stop: Arc::clone(&stop),
        ..options(&faults.endpoint())
    };
    let kept = remote_with(&options).unwrap().read(&name("there")).unwrap();
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| kept.region(0, &mut vec![0; REGION as usize]));
        has_come.recv().unwrap();
        stop.store(true, Ordering::Relaxed);
        let error = reading.join().unwrap().unwrap_err();
        assert!(matches!(error, StoreError::CalledOff), "{error}");
    });
}

#[test]
fn of_two_that_push_at_once_one_is_first() {
    let (server, local) = (Server::start(), Local::small());
    let options = options(&server.endpoint());
    for round in 0..12 {
        let pushed = std::thread::scope(|scope| {
            let pushes = ["warm", "other"].map(|named| {
                let (local, options) = (&local, &options);
                scope.spawn(move || local.push_with(named, options, 2))
            });
            pushes.map(|push| push.join().unwrap())
        });
        let hash = whole_or_not_there(&server, &local, &format!("round {round}"));
        let hashes = [local.hash("warm"), local.hash("other")];
        for (pushed, of) in pushed.into_iter().zip(hashes) {
            match pushed {
                Ok(_) => assert_eq!(hash, Some(of)),
                Err(StoreError::Exists { .. } | StoreError::Claimed { .. }) => {
                    assert_ne!(hash, Some(of));
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert!(hash.is_some(), "neither is first");
        remove(&server);
    }
}

#[test]
fn who_comes_when_another_is_about_to_end_has_lost() {
    let (server, local) = (Server::start(), Local::new());
    let (came, has_come) = mpsc::channel();
    let (go, until) = mpsc::channel();
    let mut until = Some(until);
    let faults = Faults::start(server.address(), move |request: &Request| {
        match until.take_if(|_| request.is_of("PUT", "snaps/there/snapshot.json")) {
            Some(until) => {
                came.send(()).unwrap();
                Fault::Held(until)
            }
            None => Fault::None,
        }
    });
    std::thread::scope(|scope| {
        let first = scope.spawn(|| local.push("warm", &options(&faults.endpoint())));
        has_come.recv().unwrap();
        let error = local
            .push("other", &options(&server.endpoint()))
            .unwrap_err();
        assert!(matches!(error, StoreError::Claimed { .. }), "{error}");
        assert!(whole_or_not_there(&server, &local, "while one is held").is_none());
        go.send(()).unwrap();
        first.join().unwrap().unwrap();
    });
    let hash = whole_or_not_there(&server, &local, "in the end");
    assert_eq!(hash, Some(local.hash("warm")));
}

#[test]
fn a_server_that_replaces_is_not_pushed_to() {
    let (server, local) = (Server::start_without_conditions(), Local::new());
    let error = local
        .push("warm", &options(&server.endpoint()))
        .unwrap_err();
    assert!(matches!(error, StoreError::Replaces { .. }), "{error}");
    assert_eq!(server.keys(), ["snaps/store.json"]);
}

#[test]
fn chunks_that_are_missing_or_changed_are_named() {
    let (server, local) = (Server::start(), Local::new());
    let options = options(&server.endpoint());
    local.push("warm", &options).unwrap();
    let store = remote_with(&options).unwrap();
    let keys = server.keys();
    let chunk = keys.iter().find(|key| key.contains("/chunks/")).unwrap();
    let file = server.file(chunk);
    let right = std::fs::read(&file).unwrap();
    let look = |damage: &str| -> StoreError {
        let verified = verify(&store, &name("there"), &mut HashSet::new(), &mut |_, _| {
            true
        });
        let mut wrong = verified.unwrap().wrong;
        assert_eq!(wrong.len(), 1, "{damage}");
        let error = wrong.remove(0);
        assert!(
            error
                .to_string()
                .contains(&format!("s3://{BUCKET}/{chunk}")),
            "{error}"
        );
        error
    };
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(look("none"), StoreError::NoChunk { .. }));
    for (damage, bytes) in [
        ("empty", Vec::new()),
        ("short", right[..right.len() - 1].to_vec()),
        ("long", [&right[..], &[0]].concat()),
        ("wrong", right.iter().map(|byte| byte ^ 1).collect()),
    ] {
        std::fs::write(&file, bytes).unwrap();
        let error = look(damage);
        assert!(
            matches!(error, StoreError::Damaged { .. }),
            "{damage}: {error}"
        );
    }
    std::fs::write(&file, &right).unwrap();
    // What a snapshot is, at many places of each object.
    let before = read(&store).unwrap();
    let objects = keys.iter().filter(|key| !key.contains("/chunks/"));
    let mut harmless = 0;
    for key in objects.filter(|key| !key.ends_with(".json") || key.contains("there")) {
        let file = server.file(key);
        let right = std::fs::read(&file).unwrap();
        for at in (0..right.len()).step_by(37).chain([right.len() - 1]) {
            let mut wrong = right.clone();
            wrong[at] ^= 4;
            std::fs::write(&file, &wrong).unwrap();
            harmless += u64::from(read(&store).is_ok());
            std::fs::write(&file, &right[..at]).unwrap();
            harmless += u64::from(read(&store).is_ok());
        }
        std::fs::write(&file, &right).unwrap();
        assert!(read(&store).unwrap() == before);
    }
    assert_eq!(harmless, 0);
}

#[test]
fn what_is_in_the_cache_is_not_asked_for() {
    let (server, local) = (Server::start(), Local::new());
    local.push("warm", &options(&server.endpoint())).unwrap();
    let faults = Faults::start(server.address(), |_| Fault::None);
    let dir = tempfile::tempdir().unwrap();
    let chunks = |faults: &Faults| {
        let requests = faults.requests();
        requests
            .iter()
            .filter(|request| request.path.contains("/chunks/"))
            .count()
    };
    let load = |path: &Path| {
        let cache = Arc::new(Cache::open(path, 1 << 30).unwrap());
        read(&remote(&faults.endpoint()).unwrap().with_cache(cache)).unwrap()
    };
    let first = load(dir.path());
    assert_eq!(chunks(&faults), 2);
    assert!(load(dir.path()) == first);
    assert_eq!(chunks(&faults), 2);
}

/// What a load costs from the cache, beside a directory, and from a bucket, which is the server's time here: it hands out
/// files by 4 KiB, and is built to be built quickly. For people, with `--nocapture`.
#[test]
#[ignore = "it measures, and asserts nothing"]
fn what_a_load_costs() {
    const REGIONS: u64 = 128;
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let local = Store::open_or_create(&dir.path().join("store")).unwrap();
    let options = options(&server.endpoint());
    let mut saving = Saving::begin(
        &local,
        &name("there"),
        REGIONS * REGION,
        SaveOptions::default(),
    )
    .unwrap();
    for region in 0..REGIONS {
        let content: Vec<u8> = (0..REGION).map(|n| (n * 7 + region) as u8 | 1).collect();
        saving.region(region, &content).unwrap();
    }
    saving.finish(Facts::default(), &[]).unwrap();
    let to = Store::open_or_create_objects(&url(), open(&url(), &options).unwrap()).unwrap();
    let kept = local.read(&name("there")).unwrap();
    copy(
        &kept,
        &to,
        &name("there"),
        CopyOptions::default(),
        &mut |_| true,
    )
    .unwrap();
    let load = |store: Store| {
        let began = std::time::Instant::now();
        let kept = store.read(&name("there")).unwrap();
        let mut content = vec![0; REGION as usize];
        for region in 0..REGIONS {
            kept.region(region, &mut content).unwrap();
        }
        began.elapsed()
    };
    for round in 0..5 {
        let path = dir.path().join(format!("cache{round}"));
        let cached = || {
            let cache = Cache::open(&path, 1 << 30).unwrap();
            remote_with(&options).unwrap().with_cache(Arc::new(cache))
        };
        let directory = load(local.clone());
        let fetched = load(cached());
        let again = load(cached());
        let ratio = |time: Duration| time.as_secs_f64() / directory.as_secs_f64();
        println!(
            "256 MiB: directory {directory:.0?}, cache {again:.0?} ({:.2} times that), bucket, one chunk after another, \
             {fetched:.0?} ({:.1} times)",
            ratio(again),
            ratio(fetched)
        );
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
