//! Whoever saves may write no more: by the host itself, and not by a disk that is made for it.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use palimpsest_store::{Compression, Facts, SaveOptions, Saving, SnapshotName, Store, StoreError};

const REGION: usize = 2 << 20;
/// Bytes that a file may have.
const LIMIT: u64 = 1 << 20;
/// In the environment of the one who is limited: the store.
const STORE: &str = "LIMITED_STORE";
const NAME: &str = "LIMITED_NAME";

/// Under a name that says how.
fn save(store: &Store, name: &str) -> Result<(), StoreError> {
    let compression = match name {
        "zstd" => Compression::Zstd { level: 1 },
        _ => Compression::None,
    };
    let options = SaveOptions {
        compression,
        ..SaveOptions::default()
    };
    let name: SnapshotName = name.parse().unwrap();
    let mut saving = Saving::begin(store, &name, REGION as u64, options)?;
    // Nothing that could be made smaller.
    let mut random = 1_u64;
    let mut content = vec![0; REGION];
    for word in content.chunks_mut(8) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        word.copy_from_slice(&random.to_le_bytes());
    }
    saving.region(0, &content)?;
    saving.finish(Facts::default(), &[]).map(drop)
}

#[test]
#[ignore = "is started by the other, with a limit"]
fn the_one_who_is_limited() {
    let Some(store) = std::env::var_os(STORE) else {
        return;
    };
    let store = Store::open(Path::new(&store)).unwrap();
    let error = save(&store, &std::env::var(NAME).unwrap()).unwrap_err();
    let source = std::error::Error::source(&error).map(ToString::to_string);
    let mut out = std::io::stdout();
    write!(out, "<{error}: {}>", source.unwrap_or_default()).unwrap();
}

/// Of a file that is compressed the kernel writes what fits, which is a short write, and refuses the rest. Of one that is
/// not, its length is refused at once.
#[test]
fn a_file_that_may_not_grow_is_named_with_where_and_nothing_is_left() {
    limited_to(
        "zstd",
        "cannot write ",
        &format!("chunk-0 at byte {LIMIT}: File too large"),
    );
    limited_to(
        "plain",
        "cannot set the length of ",
        "chunk-0: File too large",
    );
}

fn limited_to(name: &str, begins: &str, says: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::open_or_create(&path).unwrap();
    // In blocks of 512 bytes. A shell can do both: ignore the signal, and set the limit.
    let limited = format!(
        "trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"",
        LIMIT / 512
    );
    let output = Command::new("sh")
        .args(["-c", &limited])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "the_one_who_is_limited",
            "--include-ignored",
            "--nocapture",
        ])
        .env(STORE, &path)
        .env(NAME, name)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}");
    let (_, error) = said.split_once('<').unwrap_or_else(|| panic!("{said}"));
    assert!(error.starts_with(begins), "{error}");
    assert!(error.contains(&format!("/tmp/{name}.")), "{error}");
    assert!(error.contains(says), "{error}");
    assert_eq!(store.names().unwrap(), []);
    assert_eq!(std::fs::read_dir(path.join("tmp")).unwrap().count(), 0);
    save(&store, name).unwrap();
}
