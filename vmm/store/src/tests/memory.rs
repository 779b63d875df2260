//! A disk in memory that can lose its power: what was not made durable is not there then, or is in part.

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::disk::{Disk, File, Kind, Lock, Locked, Stamp};

/// What is at a name.
#[derive(Clone, Debug)]
enum Node {
    File {
        bytes: Vec<u8>,
        /// What a power cut leaves.
        durable: Vec<u8>,
        /// How often it was changed.
        changes: i64,
    },
    Directory {
        names: BTreeMap<String, usize>,
        durable: BTreeMap<String, usize>,
    },
}

impl Node {
    fn directory() -> Self {
        Self::Directory {
            names: BTreeMap::new(),
            durable: BTreeMap::new(),
        }
    }
}

/// The disk. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct MemoryDisk(Arc<Mutex<Vec<Node>>>);

/// What a power cut does with what is not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// All of it is lost.
    Lost,
    /// Names are there, whatever they name is not: what a disk does that writes in another order.
    NamesKept,
    /// Each name is as it was or as it is, by chance of this seed.
    ByChance(u64),
}

fn error(kind: io::ErrorKind) -> io::Error {
    kind.into()
}

impl MemoryDisk {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(vec![Node::directory()])))
    }

    fn nodes(&self) -> MutexGuard<'_, Vec<Node>> {
        self.0.lock().unwrap()
    }

    /// Changes a byte of a file, or the last one if it is shorter, below what is seen of files.
    pub(super) fn rot(&self, path: &Path, at: usize) {
        let node = find(&self.nodes(), path).unwrap();
        let Node::File { bytes, .. } = &mut self.nodes()[node] else {
            panic!("only files rot");
        };
        let at = at.min(bytes.len() - 1);
        bytes[at] ^= 1;
    }

    /// What is left when the power goes and comes back.
    pub(super) fn after(&self, cut: Cut) -> Self {
        let mut nodes = self.nodes().clone();
        let mut seed = match cut {
            Cut::ByChance(seed) => seed,
            _ => 0,
        };
        let mut chance = || {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            seed >> 63 == 1
        };
        for node in &mut nodes {
            match node {
                Node::File { bytes, durable, .. } => bytes.clone_from(durable),
                Node::Directory { names, durable } => {
                    let all: Vec<_> = names.keys().chain(durable.keys()).cloned().collect();
                    for name in all {
                        let takes_new = match cut {
                            Cut::Lost => false,
                            Cut::NamesKept => true,
                            Cut::ByChance(_) => chance(),
                        };
                        let left = if takes_new { &*names } else { &*durable };
                        match left.get(&name).copied() {
                            Some(node) => drop(durable.insert(name, node)),
                            None => drop(durable.remove(&name)),
                        }
                    }
                    names.clone_from(durable);
                }
            }
        }
        Self(Arc::new(Mutex::new(nodes)))
    }
}

fn find(nodes: &[Node], path: &Path) -> io::Result<usize> {
    let mut at = 0;
    for part in path.components() {
        let Component::Normal(part) = part else {
            continue;
        };
        let Node::Directory { names, .. } = &nodes[at] else {
            return Err(error(io::ErrorKind::NotADirectory));
        };
        let found = names.get(part.to_str().unwrap());
        at = *found.ok_or(error(io::ErrorKind::NotFound))?;
    }
    Ok(at)
}

/// The names beside `path`, and its own.
fn names_at<'a>(
    nodes: &'a mut [Node],
    path: &Path,
) -> io::Result<(&'a mut BTreeMap<String, usize>, String)> {
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    let parent = find(nodes, path.parent().unwrap())?;
    match &mut nodes[parent] {
        Node::Directory { names, .. } => Ok((names, name)),
        Node::File { .. } => Err(error(io::ErrorKind::NotADirectory)),
    }
}

fn add(nodes: &mut Vec<Node>, path: &Path, node: Node) -> io::Result<usize> {
    let new = nodes.len();
    let (names, name) = names_at(nodes, path)?;
    if names.contains_key(&name) {
        return Err(error(io::ErrorKind::AlreadyExists));
    }
    names.insert(name, new);
    nodes.push(node);
    Ok(new)
}

impl Disk for MemoryDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let file = Node::File {
            bytes: Vec::new(),
            durable: Vec::new(),
            changes: 0,
        };
        let node = add(&mut self.nodes(), path, file)?;
        Ok(Box::new(Open {
            disk: self.clone(),
            node,
        }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let nodes = self.nodes();
        let node = find(&nodes, path)?;
        match nodes[node] {
            Node::File { .. } => Ok(Box::new(Open {
                disk: self.clone(),
                node,
            })),
            Node::Directory { .. } => Err(error(io::ErrorKind::IsADirectory)),
        }
    }

    fn make_dir(&self, path: &Path) -> io::Result<()> {
        add(&mut self.nodes(), path, Node::directory()).map(drop)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut nodes = self.nodes();
        let node = find(&nodes, path)?;
        match &mut nodes[node] {
            Node::Directory { names, durable } => durable.clone_from(names),
            Node::File { .. } => return Err(error(io::ErrorKind::NotADirectory)),
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut nodes = self.nodes();
        let node = find(&nodes, from)?;
        if let Ok(there) = find(&nodes, to) {
            match (&nodes[node], &nodes[there]) {
                (Node::File { .. }, Node::File { .. }) => {}
                (Node::Directory { .. }, Node::Directory { names, .. }) if names.is_empty() => {}
                (Node::Directory { .. }, Node::File { .. }) => {
                    return Err(error(io::ErrorKind::NotADirectory));
                }
                (Node::Directory { .. }, _) => {
                    return Err(error(io::ErrorKind::DirectoryNotEmpty));
                }
                _ => return Err(error(io::ErrorKind::IsADirectory)),
            }
        }
        let (names, name) = names_at(&mut nodes, to)?;
        names.insert(name, node);
        let (names, name) = names_at(&mut nodes, from)?;
        names.remove(&name);
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut nodes = self.nodes();
        let node = find(&nodes, path)?;
        if matches!(nodes[node], Node::Directory { .. }) {
            return Err(error(io::ErrorKind::IsADirectory));
        }
        let (names, name) = names_at(&mut nodes, path)?;
        names.remove(&name);
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut nodes = self.nodes();
        let node = find(&nodes, path)?;
        match &nodes[node] {
            Node::Directory { names, .. } if names.is_empty() => {}
            Node::Directory { .. } => return Err(error(io::ErrorKind::DirectoryNotEmpty)),
            Node::File { .. } => return Err(error(io::ErrorKind::NotADirectory)),
        }
        let (names, name) = names_at(&mut nodes, path)?;
        names.remove(&name);
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<(String, Kind)>> {
        let nodes = self.nodes();
        let Node::Directory { names, .. } = &nodes[find(&nodes, path)?] else {
            return Err(error(io::ErrorKind::NotADirectory));
        };
        let kind = |node: &usize| match nodes[*node] {
            Node::File { .. } => Kind::File,
            Node::Directory { .. } => Kind::Directory,
        };
        Ok(names
            .iter()
            .map(|(name, node)| (name.clone(), kind(node)))
            .collect())
    }

    fn kind(&self, path: &Path) -> io::Result<Option<Kind>> {
        let nodes = self.nodes();
        match find(&nodes, path) {
            Ok(node) => Ok(Some(match nodes[node] {
                Node::File { .. } => Kind::File,
                Node::Directory { .. } => Kind::Directory,
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn len(&self, path: &Path) -> io::Result<Option<u64>> {
        match self.open(path) {
            Ok(file) => file.len().map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn stamp(&self, path: &Path) -> io::Result<Option<Stamp>> {
        match self.open(path) {
            Ok(file) => file.stamp().map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn real(&self, path: &Path) -> io::Result<PathBuf> {
        find(&self.nodes(), path).map(|_| path.to_owned())
    }

    fn allocated(&self, path: &Path) -> io::Result<u64> {
        self.open(path)?.len()
    }

    fn lock(&self, path: &Path, _: Lock) -> io::Result<Option<Box<dyn Locked>>> {
        find(&self.nodes(), path)?;
        Ok(Some(Box::new(Held)))
    }
}

/// Nobody else is there.
#[derive(Debug)]
struct Held;

impl Locked for Held {}

#[derive(Debug)]
struct Open {
    disk: MemoryDisk,
    node: usize,
}

impl Open {
    fn with<R>(&self, look: impl FnOnce(&mut Vec<u8>, &mut Vec<u8>) -> R) -> R {
        match &mut self.disk.nodes()[self.node] {
            Node::File { bytes, durable, .. } => look(bytes, durable),
            Node::Directory { .. } => unreachable!("only files are opened"),
        }
    }

    /// The same of its content, which changes.
    fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        self.with(|bytes, _| change(bytes));
        if let Node::File { changes, .. } = &mut self.disk.nodes()[self.node] {
            *changes += 1;
        }
    }
}

impl File for Open {
    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<usize> {
        self.with(|bytes, _| {
            let rest = bytes.get(offset as usize..).unwrap_or_default();
            let count = rest.len().min(to.len());
            to[..count].copy_from_slice(&rest[..count]);
            Ok(count)
        })
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<usize> {
        self.change(|bytes| {
            let end = offset as usize + from.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[offset as usize..end].copy_from_slice(from);
        });
        Ok(from.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(|bytes| bytes.resize(len as usize, 0));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|bytes, _| bytes.len() as u64))
    }

    fn stamp(&self) -> io::Result<Stamp> {
        let bytes = self.len()?;
        let Node::File { changes, .. } = self.disk.nodes()[self.node] else {
            unreachable!("only files are opened");
        };
        Ok(Stamp {
            device: 1,
            inode: self.node as u64,
            bytes,
            modified: (changes, 0),
            changed: (changes, 0),
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|bytes, durable| durable.clone_from(bytes));
        Ok(())
    }
}
