//! Machines as a tree.

use crate::cli::units::count;
use crate::session::family::progress::MemberProgress;

/// The machines of `members`, each below its parent, in `most` lines at most: what does not fit is counted. One
/// whose parent is gone stands where that would.
pub(super) fn lines(members: &[MemberProgress], most: usize) -> Vec<String> {
    let lives = |id: usize| members.iter().any(|m| m.id == id);
    let mut lines = Vec::new();
    let roots = members
        .iter()
        .filter(|m| m.parent.is_none_or(|parent| !lives(parent)));
    for root in roots {
        add(members, root, "", "", &mut lines);
    }
    if lines.len() > most {
        let left = lines.len() + 1 - most;
        lines.truncate(most.saturating_sub(1));
        lines.push(format!("... and {} more", count(left as u64)));
    }
    lines
}

fn add(
    members: &[MemberProgress],
    of: &MemberProgress,
    before: &str,
    below: &str,
    lines: &mut Vec<String>,
) {
    let name = match of.depth {
        0 => "root".to_owned(),
        _ => format!("clone {}", of.id),
    };
    let orphan = if of.depth > 0 && before.is_empty() {
        of.parent
            .map(|parent| format!(", of {parent}, which is gone"))
    } else {
        None
    };
    lines.push(format!(
        "{before}{name}  {} operations/s{}",
        count(of.ops_per_s as u64),
        orphan.unwrap_or_default()
    ));
    let mut children = members
        .iter()
        .filter(|m| m.parent == Some(of.id))
        .peekable();
    while let Some(child) = children.next() {
        let (branch, rest) = match children.peek() {
            Some(_) => ("├─ ", "│  "),
            None => ("└─ ", "   "),
        };
        let (before, deeper) = (format!("{below}{branch}"), format!("{below}{rest}"));
        add(members, child, &before, &deeper, lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: usize, parent: Option<usize>, depth: u64) -> MemberProgress {
        MemberProgress {
            id,
            parent,
            depth,
            ops: 0,
            ops_per_s: 1000.0 * (id + 1) as f64,
        }
    }

    #[test]
    fn clones_stand_below_whose_they_are() {
        let members = [
            member(0, None, 0),
            member(1, Some(0), 1),
            member(2, Some(0), 1),
            member(3, Some(1), 2),
            member(4, Some(1), 2),
        ];
        assert_eq!(
            lines(&members, 10),
            [
                "root  1,000 operations/s",
                "├─ clone 1  2,000 operations/s",
                "│  ├─ clone 3  4,000 operations/s",
                "│  └─ clone 4  5,000 operations/s",
                "└─ clone 2  3,000 operations/s",
            ]
        );
        assert_eq!(
            lines(&members, 3)[1..],
            ["├─ clone 1  2,000 operations/s", "... and 3 more"]
        );
        // The root is gone, and clone 1.
        assert_eq!(
            lines(&members[2..], 10),
            [
                "clone 2  3,000 operations/s, of 0, which is gone",
                "clone 3  4,000 operations/s, of 1, which is gone",
                "clone 4  5,000 operations/s, of 1, which is gone",
            ]
        );
    }
}
