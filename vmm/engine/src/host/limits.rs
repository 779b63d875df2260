//! How much this process may take of the host, and who says so.
//!
//! Memory is limited by what the host has, and by every control group that the process is in, its ancestors
//! included. A process that takes more than its group allows is killed without a message, so the groups are
//! asked before. Resource limits (`ulimit`) bound addresses, private memory and the size of a file, a file in
//! memory included: a call beyond them fails, and asking here lets an error name the limit beforehand.

use std::io;
use std::path::{Path, PathBuf};
use std::{fmt, fs};

use rustix::process::{Resource, getrlimit};

/// Who limits what a process may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Limiter {
    /// The host: what it can give without swapping.
    Host,
    /// A control group, by the file that has its limit.
    ControlGroup(PathBuf),
    /// `RLIMIT_AS`: addresses.
    AddressSpace,
    /// `RLIMIT_DATA`: private memory, stacks included.
    Data,
    /// `RLIMIT_FSIZE`: the length of a file.
    FileSize,
}

impl fmt::Display for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("this host"),
            Self::ControlGroup(file) => write!(f, "the control group's {}", file.display()),
            Self::AddressSpace => f.write_str("RLIMIT_AS (ulimit -v)"),
            Self::Data => f.write_str("RLIMIT_DATA (ulimit -d)"),
            Self::FileSize => f.write_str("RLIMIT_FSIZE (ulimit -f)"),
        }
    }
}

/// What somebody leaves to this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// Who.
    pub by: Limiter,
    /// Bytes that may still be taken.
    pub left: u64,
}

/// Everything that limits this process, as it is just now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of memory: the host, and the control groups that have a limit. Never empty.
    memory: Vec<Room>,
    /// Resource limits, those that are set.
    resources: Vec<Room>,
}

impl Limits {
    /// Asks the host.
    ///
    /// # Errors
    /// If it does not say how much memory it has.
    pub fn detect() -> io::Result<Self> {
        let read = |path| fs::read_to_string(path);
        let available = mem_available(&read("/proc/meminfo")?).ok_or_else(|| {
            let what = "no MemAvailable in /proc/meminfo";
            io::Error::new(io::ErrorKind::InvalidData, what)
        })?;
        let mut limits = Self::of_host(available);
        // A kernel without control groups has neither file.
        if let (Ok(groups), Ok(mounts)) = (read("/proc/self/cgroup"), read("/proc/self/mountinfo"))
        {
            limits.memory.extend(control_groups(&groups, &mounts));
        }
        let statm = read("/proc/self/status").unwrap_or_default();
        let used = |field| kib_of(&statm, field).unwrap_or(0);
        for (resource, by, used) in [
            (Resource::As, Limiter::AddressSpace, used("VmSize:")),
            (Resource::Data, Limiter::Data, used("VmData:")),
            (Resource::Fsize, Limiter::FileSize, 0),
        ] {
            if let Some(limit) = getrlimit(resource).current {
                let left = limit.saturating_sub(used);
                limits.resources.push(Room { by, left });
            }
        }
        Ok(limits)
    }

    /// What a host limits that has `available` bytes of memory, and nothing else does.
    pub fn of_host(available: u64) -> Self {
        Self {
            memory: vec![Room {
                by: Limiter::Host,
                left: available,
            }],
            resources: Vec::new(),
        }
    }

    /// The same, and `room` besides.
    #[must_use]
    pub fn and(mut self, room: Room) -> Self {
        match room.by {
            Limiter::Host | Limiter::ControlGroup(_) => self.memory.push(room),
            _ => self.resources.push(room),
        }
        self
    }

    /// Who leaves the least memory.
    pub fn memory(&self) -> &Room {
        let least = self.memory.iter().min_by_key(|room| room.left);
        least.expect("the host is always asked")
    }

    /// Who leaves the least, be it of memory or of what else it takes.
    pub fn tightest(&self) -> &Room {
        let rooms = self.memory.iter().chain(&self.resources);
        let least = rooms.min_by_key(|room| room.left);
        least.expect("the host is always asked")
    }

    /// What resource limit `by` leaves, if it is set.
    pub fn resource(&self, by: &Limiter) -> Option<&Room> {
        self.resources.iter().find(|room| room.by == *by)
    }
}

/// Bytes that the `MemAvailable` line of `meminfo` gives.
fn mem_available(meminfo: &str) -> Option<u64> {
    kib_of(meminfo, "MemAvailable:")
}

/// Bytes that the line of `text` gives which begins with `field`.
fn kib_of(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

/// How a hierarchy of control groups spells things.
struct Hierarchy {
    /// Files with limits. Every one of them counts.
    limits: &'static [&'static str],
    usage: &'static str,
    /// The line of `memory.stat` that has what is used and can be had back: pages of files.
    reclaimable: &'static str,
}

const V1: Hierarchy = Hierarchy {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
const V2: Hierarchy = Hierarchy {
    // Above `high` nobody is killed, but everybody is slowed down until hardly anything moves.
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    reclaimable: "inactive_file",
};

/// What the control groups of this process leave it: `groups` is `/proc/self/cgroup`, `mounts`
/// `/proc/self/mountinfo`.
fn control_groups(groups: &str, mounts: &str) -> Vec<Room> {
    let mut rooms = Vec::new();
    for line in groups.lines() {
        // hierarchy-ID:controllers:path
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let hierarchy = match controllers {
            "" => V2,
            _ if controllers.split(',').any(|name| name == "memory") => V1,
            _ => continue,
        };
        let Some((top, path)) = mounted(mounts, controllers.is_empty(), Path::new(path)) else {
            continue;
        };
        rooms.extend(
            path.ancestors()
                .flat_map(|group| left_in(&top.join(group), &hierarchy)),
        );
    }
    rooms
}

/// Where the hierarchy is mounted that `path` is of, and where in it that group is from there.
fn mounted(mounts: &str, is_v2: bool, path: &Path) -> Option<(PathBuf, PathBuf)> {
    mounts.lines().find_map(|line| {
        // id parent major:minor root mount-point options ... - type source super-options
        let (mount, system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (mount.next()?, mount.next()?);
        let mut system = system.split(' ');
        let (kind, options) = (system.next()?, system.nth(1)?);
        let is_ours = match kind {
            "cgroup2" => is_v2,
            "cgroup" => !is_v2 && options.split(',').any(|option| option == "memory"),
            _ => false,
        };
        // In a container the mount may begin below the root of the hierarchy, and the path names what is not
        // to be seen.
        let below = path.strip_prefix(root).unwrap_or(Path::new(""));
        let below = below.strip_prefix("/").unwrap_or(below);
        is_ours.then(|| (PathBuf::from(unescaped(point)), below.to_owned()))
    })
}

/// A path of `mountinfo`, in which some characters are written in octal.
fn unescaped(path: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(path.to_owned(), |path, (code, character)| {
        path.replace(code, character)
    })
}

/// What group `group` leaves, by each of its limits.
fn left_in(group: &Path, hierarchy: &Hierarchy) -> Vec<Room> {
    let number = |file: &str| -> Option<u64> {
        let text = fs::read_to_string(group.join(file)).ok()?;
        text.trim().parse().ok()
    };
    let Some(used) = number(hierarchy.usage) else {
        return Vec::new();
    };
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let reclaimable = stat.lines().find_map(|line| {
        let (name, bytes) = line.split_once(' ')?;
        (name == hierarchy.reclaimable).then(|| bytes.trim().parse().ok())?
    });
    let used = used.saturating_sub(reclaimable.unwrap_or(0));
    let room = |file: &&str| {
        // No limit is the word `max`, or a number that no machine has bytes for.
        let limit = number(file).filter(|&limit| limit < i64::MAX as u64 / 2)?;
        Some(Room {
            by: Limiter::ControlGroup(group.join(file)),
            left: limit.saturating_sub(used),
        })
    };
    hierarchy.limits.iter().filter_map(room).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_from_meminfo() {
        let meminfo = "MemTotal:       24576000 kB\nMemAvailable:   20480 kB\nBuffers: 1 kB\n";
        assert_eq!(mem_available(meminfo), Some(20 << 20));
        assert_eq!(mem_available("MemTotal: 1 kB\n"), None);
        assert!(Limits::detect().unwrap().memory().left > 0);
    }

    #[test]
    fn the_smallest_limit_counts() {
        let group = Limiter::ControlGroup("/sys/fs/cgroup/a/memory.max".into());
        let room = |by: &Limiter, left| Room {
            by: by.clone(),
            left,
        };
        let limits = Limits::of_host(100).and(room(&group, 50));
        assert_eq!(limits.memory(), &room(&group, 50));
        let limits = Limits::of_host(40)
            .and(room(&group, 50))
            .and(room(&Limiter::Data, 7));
        assert_eq!(limits.memory().by, Limiter::Host);
        assert_eq!(limits.resource(&Limiter::Data).unwrap().left, 7);
        assert_eq!(limits.resource(&Limiter::FileSize), None);
    }

    fn write(directory: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(directory).unwrap();
        for (name, text) in files {
            fs::write(directory.join(name), text).unwrap();
        }
    }

    fn mountinfo(root: &str, point: &Path, system: &str) -> String {
        format!(
            "22 21 0:5 / /proc rw shared:1 - proc proc rw\n30 21 0:26 {root} {} rw,relatime - {system}\n",
            point.display()
        )
    }

    #[test]
    fn every_ancestor_of_version_2_counts() {
        let top = tempfile::tempdir().unwrap();
        let (outer, inner) = (top.path().join("a"), top.path().join("a/b"));
        write(
            &outer,
            &[
                ("memory.max", "1000000\n"),
                ("memory.high", "900000\n"),
                ("memory.current", "600000\n"),
                ("memory.stat", "anon 5\ninactive_file 100000\n"),
            ],
        );
        write(
            &inner,
            &[("memory.max", "max\n"), ("memory.current", "1\n")],
        );
        let mounts = mountinfo("/", top.path(), "cgroup2 cgroup2 rw");
        assert_eq!(
            control_groups("0::/a/b\n", &mounts),
            [
                Room {
                    by: Limiter::ControlGroup(outer.join("memory.max")),
                    left: 500_000
                },
                Room {
                    by: Limiter::ControlGroup(outer.join("memory.high")),
                    left: 400_000
                },
            ]
        );
    }

    #[test]
    fn version_1_counts_where_memory_is_in_it() {
        let top = tempfile::tempdir().unwrap();
        write(
            &top.path().join("a"),
            &[
                ("memory.limit_in_bytes", "5000\n"),
                ("memory.usage_in_bytes", "7000\n"),
            ],
        );
        // What the top says when there is no limit.
        write(
            top.path(),
            &[
                ("memory.limit_in_bytes", "9223372036854771712\n"),
                ("memory.usage_in_bytes", "7000\n"),
            ],
        );
        let mounts = mountinfo("/", top.path(), "cgroup cgroup rw,memory");
        let file = top.path().join("a/memory.limit_in_bytes");
        let overdrawn = Room {
            by: Limiter::ControlGroup(file),
            left: 0,
        };
        let groups = "4:cpu,memory:/a\n3:cpuset:/a\n0::/\n";
        assert_eq!(control_groups(groups, &mounts), [overdrawn]);
        let other = mountinfo("/", top.path(), "cgroup cgroup rw,cpu");
        assert_eq!(control_groups(groups, &other), []);
    }

    #[test]
    fn a_container_sees_its_group_at_the_top() {
        let top = tempfile::tempdir().unwrap();
        let files = [("memory.max", "10\n"), ("memory.current", "4\n")];
        write(top.path(), &files);
        let limit = Room {
            by: Limiter::ControlGroup(top.path().join("memory.max")),
            left: 6,
        };
        // The mount begins at the group, or the group is above what is mounted.
        for (root, path) in [("/docker/7", "/docker/7"), ("/docker/7", "/"), ("/", "/")] {
            let mounts = mountinfo(root, top.path(), "cgroup2 none rw,nsdelegate");
            let rooms = control_groups(&format!("0::{path}\n"), &mounts);
            assert_eq!(rooms, std::slice::from_ref(&limit), "{root} {path}");
        }
    }

    #[test]
    fn nonsense_limits_nothing() {
        assert_eq!(control_groups("", ""), []);
        assert_eq!(
            control_groups("x\n1:memory\n0::/nowhere\n", "y - cgroup2\nz\n"),
            []
        );
    }
}
