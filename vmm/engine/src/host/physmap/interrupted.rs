//! A system call that signals keep from getting done.

use rustix::io::Errno;

use crate::mm::PAGE_SIZE;

/// Does `call` for the `len` bytes from `offset` on, in parts if it is interrupted.
///
/// Kicks of the vCPU whose fault this is interrupt `fallocate`, which then undoes what it has done
/// (`shmem_fallocate` in `mm/shmem.c`; seen on Linux 6.1, no more on 6.18). On a host that is slower than the
/// kicks come it would never get there, so it is asked for less each time.
pub(super) fn in_spite_of_signals(
    mut offset: u64,
    len: u64,
    mut call: impl FnMut(u64, u64) -> rustix::io::Result<()>,
) -> rustix::io::Result<()> {
    let end = offset + len;
    let mut most = len;
    while offset < end {
        let part = most.min(end - offset);
        match call(offset, part) {
            Ok(()) => offset += part,
            Err(Errno::INTR) => most = (part / 2).next_multiple_of(PAGE_SIZE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that gives six pages at a time, and never more before the next signal.
    #[test]
    fn a_slow_host_gets_there_between_signals() {
        let (mut given, mut calls) = (Vec::new(), 0);
        let slow = |offset: u64, len: u64| {
            calls += 1;
            assert!(calls < 20 && len > 0, "it does not get there: {given:?}");
            if len > 6 * PAGE_SIZE {
                return Err(Errno::INTR);
            }
            given.push(offset / PAGE_SIZE..(offset + len) / PAGE_SIZE);
            Ok(())
        };
        in_spite_of_signals(PAGE_SIZE, 21 * PAGE_SIZE, slow).unwrap();
        assert_eq!(given, [1..7, 7..13, 13..19, 19..22]);
    }

    #[test]
    fn what_a_host_refuses_is_refused() {
        let refused = in_spite_of_signals(0, 2 * PAGE_SIZE, |_, _| Err(Errno::NOSPC));
        assert_eq!(refused, Err(Errno::NOSPC));
        let mut signals = 3;
        let one_page = in_spite_of_signals(0, PAGE_SIZE, |_, len| {
            assert_eq!(len, PAGE_SIZE);
            signals -= 1;
            if signals > 0 {
                Err(Errno::INTR)
            } else {
                Ok(())
            }
        });
        assert_eq!(one_page, Ok(()));
    }
}
