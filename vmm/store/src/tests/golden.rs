//! A store of each version of the format, as it was once written: whoever changes how the format is read breaks
//! these. They are never written again; a new version gets one of its own (`write_golden`).

use std::path::PathBuf;

use super::*;
use crate::manifest::{Cpu, Machine};

fn golden(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(version)
}

/// What is in memory: a page of each region that there is.
fn page(number: u8) -> Vec<u8> {
    (0..4096_u32).map(|n| (n / 16) as u8 ^ number).collect()
}

fn facts() -> Facts {
    let cpu = Cpu {
        vendor: "GenuineGold".to_owned(),
        brand: "golden".to_owned(),
        features: BTreeMap::from([("1.0.ecx".to_owned(), "0xff".to_owned())]),
    };
    Facts {
        creator: "golden 1".to_owned(),
        machine: Machine {
            vcpus: 2,
            devices: 1,
            accelerator: "kvm".to_owned(),
            platform: "test".to_owned(),
            tsc_khz: 2_500_000,
            cpu,
            msrs: vec![0x10, 0xc000_0080],
        },
        program: [("seed".to_owned(), u64::MAX.into())].into_iter().collect(),
    }
}

fn write_to(
    store: &Store,
    named: &str,
    parent: Option<&str>,
    numbers: &[u8],
    compression: Compression,
) {
    let options = SaveOptions {
        compression,
        parent: parent.map(|parent| store.parent(&name(parent)).unwrap()),
    };
    let memory = 4096 * numbers.len() as u64;
    let mut saving = Saving::begin(store, &name(named), memory, options).unwrap();
    let content: Vec<u8> = numbers.iter().flat_map(|number| page(*number)).collect();
    saving.region(0, &content).unwrap();
    saving.finish(facts(), &parts()).unwrap();
}

#[test]
fn version_1_is_read() {
    let store = Store::open(&golden("v1")).unwrap();
    assert_eq!(store.names().unwrap(), [name("compressed"), name("plain")]);
    for (named, numbers) in [("plain", &[1, 2][..]), ("compressed", &[1, 3, 3])] {
        let kept = store.read(&name(named)).unwrap();
        let expected: Vec<u8> = numbers.iter().flat_map(|number| page(*number)).collect();
        let mut found = vec![0; expected.len()];
        assert!(kept.region(0, &mut found).unwrap());
        assert!(found == expected, "{named}");
        assert_eq!(kept.parts(), parts());
        let manifest = kept.manifest();
        assert_eq!(
            (&manifest.machine, &manifest.program),
            (&facts().machine, &facts().program)
        );
        assert_eq!(manifest.creator, "golden 1");
        assert!(wrong(&store, named).is_empty());
    }
    let compressed = store.read(&name("compressed")).unwrap();
    let parent = compressed.manifest().parent.clone().unwrap();
    assert_eq!(parent.blake3, store.read(&name("plain")).unwrap().hash());
}

#[test]
#[ignore = "writes the golden store of a new version: for who makes one"]
fn write_golden() {
    std::fs::create_dir_all(golden("v1")).unwrap();
    let store = Store::open_or_create(&golden("v1")).unwrap();
    write_to(&store, "plain", None, &[1, 2], Compression::None);
    write_to(
        &store,
        "compressed",
        Some("plain"),
        &[1, 3, 3],
        Compression::Zstd { level: 3 },
    );
    std::fs::remove_dir(store.path().join("tmp")).unwrap();
}
