//! What the guest ABI has a VMM do before a guest runs: its program, page tables, and what it is told.

use guest::abi::{
    BOOT_INFO_GPA, BOOT_MAGIC, BootInfo, IMAGE_GPA, LOW_MEMORY, LOWEST_GPA, Layout, MAX_MEMORY,
    PAGE_SIZE, PAGE_TABLES_GPA, Pattern, stack_top,
};
use palimpsest::kvm::{self, BootError, EntryState, GuestRam, Image};

/// A page that the ABI leaves unused, and that stays zero. Only KVM looks at it.
const TASK_GPA: u64 = 0x2000;
const _: () = assert!(TASK_GPA + PAGE_SIZE <= LOWEST_GPA);

/// Checks that `file` is a program that a guest can run.
///
/// # Errors
/// What is wrong with it.
pub fn parse(file: impl Into<Vec<u8>>) -> Result<Image, BootError> {
    Image::parse(file, IMAGE_GPA..MAX_MEMORY)
}

/// Where vCPU `vcpu` of a guest that is laid out so begins a program whose first instruction is at `rip`.
pub fn entry(layout: &Layout, rip: u64, vcpu: usize) -> EntryState {
    let vcpu = vcpu as u64;
    EntryState {
        rip,
        rsp: layout.stack_top(vcpu),
        arguments: [BOOT_INFO_GPA, vcpu],
        page_tables: layout.page_tables,
        task: TASK_GPA,
    }
}

/// As [`entry`], of one of the first [`LOW_STACKS`](guest::abi::LOW_STACKS) vCPUs of a guest without a layout,
/// whose page tables are those of [`write_page_tables`].
pub fn low_entry(rip: u64, vcpu: usize) -> EntryState {
    let vcpu = vcpu as u64;
    EntryState {
        rip,
        rsp: stack_top(vcpu),
        arguments: [BOOT_INFO_GPA, vcpu],
        page_tables: PAGE_TABLES_GPA,
        task: TASK_GPA,
    }
}

/// Writes page tables for `memory` bytes of memory, of which [`LOW_MEMORY`] bytes are mapped at most, below
/// the image, and returns the gpa behind them.
///
/// # Errors
/// If guest memory can't be written.
pub fn write_page_tables(ram: &dyn GuestRam, memory: u64) -> Result<u64, BootError> {
    kvm::write_page_tables(ram, PAGE_TABLES_GPA, memory.min(LOW_MEMORY))
}

/// Writes what a guest looks for in its memory at first: page tables, and what it is to do. Its generation is
/// for [`Incarnations`](crate::incarnation::Incarnations).
///
/// # Errors
/// If guest memory can't be written.
pub fn write_first_memory(
    ram: &dyn GuestRam,
    layout: Layout,
    seed: u64,
    pattern: Pattern,
) -> Result<(), BootError> {
    kvm::write_page_tables(ram, layout.page_tables, layout.memory)?;
    let info = BootInfo {
        magic: BOOT_MAGIC,
        seed,
        layout,
        pattern: pattern as u64,
    };
    write_boot_info(ram, &info)
}

/// Words of a [`BootInfo`].
const BOOT_INFO_WORDS: usize = 12;
const _: () = assert!(size_of::<BootInfo>() == BOOT_INFO_WORDS * 8);

/// Writes `info` where the guest looks for it.
fn write_boot_info(ram: &dyn GuestRam, info: &BootInfo) -> Result<(), BootError> {
    // Taken apart by name, in the order of `repr(C)`: a field that is added does not compile here.
    let &BootInfo {
        magic,
        seed,
        layout:
            Layout {
                memory,
                vcpus,
                devices,
                registered,
                vcpu_base,
                device_base,
                stacks_base,
                page_tables,
                hammer_base,
            },
        pattern,
    } = info;
    let words: [u64; BOOT_INFO_WORDS] = [
        magic,
        seed,
        memory,
        vcpus,
        devices,
        registered,
        vcpu_base,
        device_base,
        stacks_base,
        page_tables,
        hammer_base,
        pattern,
    ];
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    ram.write(BOOT_INFO_GPA, &bytes)
        .map_err(|source| BootError::Memory {
            gpa: BOOT_INFO_GPA,
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use guest::abi::{LOW_STACKS, MAX_VCPUS, STACK_SIZE, STACKS_GPA, page_tables_size};
    use palimpsest::causes::Cause;

    use super::*;

    /// Guest memory that is only bytes.
    struct Bytes(Mutex<Vec<u8>>);

    impl GuestRam for Bytes {
        fn len(&self) -> u64 {
            self.0.lock().unwrap().len() as u64
        }
        fn write_fault(&self, _: u64) -> Result<bool, Cause> {
            Ok(false)
        }
        fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), Cause> {
            buf.copy_from_slice(&self.0.lock().unwrap()[gpa as usize..][..buf.len()]);
            Ok(())
        }
        fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), Cause> {
            self.0.lock().unwrap()[gpa as usize..][..buf.len()].copy_from_slice(buf);
            Ok(())
        }
    }

    #[test]
    fn page_tables_end_below_the_boot_info_however_much_memory_there_is() {
        let ram = Bytes(Mutex::new(vec![0; 2 << 20]));
        for memory in [64 << 20, LOW_MEMORY, MAX_MEMORY] {
            let end = write_page_tables(&ram, memory).unwrap();
            assert!(
                (PAGE_TABLES_GPA + 1..=BOOT_INFO_GPA).contains(&end),
                "{end:#x}"
            );
        }
    }

    #[test]
    fn each_vcpu_has_a_number_and_a_stack_of_its_own() {
        let layout = Layout::new(1 << 30, IMAGE_GPA + 12_345, MAX_VCPUS, 8, 3).unwrap();
        let [low, high] = layout.stacks();
        let mut next = STACKS_GPA;
        for vcpu in 0..MAX_VCPUS {
            let entry = entry(&layout, IMAGE_GPA, vcpu as usize);
            if vcpu == LOW_STACKS {
                assert_eq!(next, low.end);
                next = high.start;
            }
            assert_eq!(entry.rsp, next + STACK_SIZE);
            assert_eq!(entry.arguments, [BOOT_INFO_GPA, vcpu]);
            if vcpu < LOW_STACKS {
                assert_eq!(entry, low_entry(IMAGE_GPA, vcpu as usize));
            }
            next = entry.rsp;
        }
        assert_eq!(next, high.end);
        assert!(low.end <= IMAGE_GPA);
        assert!((layout.device_area(8)..=layout.hammer_base).contains(&high.start));
        // A pointer that is written to a port has 32 bits.
        assert!(high.end <= layout.hammer_base && high.end < 1 << 32);
    }

    #[test]
    fn page_tables_of_much_memory_are_above_the_image() {
        for memory in [LOW_MEMORY + PAGE_SIZE, 1 << 40, MAX_MEMORY] {
            let layout = Layout::new(memory, IMAGE_GPA + 12_345, 256, 8, 3).unwrap();
            let end = layout.page_tables + page_tables_size(memory);
            assert!(layout.page_tables >= layout.stacks()[1].end);
            assert!(end <= layout.hammer_base && end < 1 << 32);
        }
    }

    #[test]
    fn boot_info_is_laid_out_as_the_guest_reads_it() {
        let ram = Bytes(Mutex::new(vec![0; 1 << 20]));
        let layout = Layout::new(64 << 20, IMAGE_GPA + 4096, 2, 1, 3).unwrap();
        let info = BootInfo {
            magic: BOOT_MAGIC,
            seed: 7,
            layout,
            pattern: Pattern::Hot as u64,
        };
        write_boot_info(&ram, &info).unwrap();
        let mut bytes = [0; 8 * BOOT_INFO_WORDS];
        ram.read(BOOT_INFO_GPA, &mut bytes).unwrap();
        let word =
            |offset: usize| u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap());
        use std::mem::offset_of;
        assert_eq!(word(offset_of!(BootInfo, magic)), BOOT_MAGIC);
        assert_eq!(word(offset_of!(BootInfo, seed)), 7);
        assert_eq!(word(offset_of!(BootInfo, pattern)), Pattern::Hot as u64);
        let at = offset_of!(BootInfo, layout);
        assert_eq!(word(at + offset_of!(Layout, memory)), layout.memory);
        assert_eq!(word(at + offset_of!(Layout, vcpus)), 2);
        assert_eq!(word(at + offset_of!(Layout, devices)), 1);
        assert_eq!(word(at + offset_of!(Layout, registered)), 3);
        assert_eq!(word(at + offset_of!(Layout, vcpu_base)), layout.vcpu_base);
        assert_eq!(
            word(at + offset_of!(Layout, device_base)),
            layout.device_base
        );
        assert_eq!(
            word(at + offset_of!(Layout, stacks_base)),
            layout.stacks_base
        );
        assert_eq!(
            word(at + offset_of!(Layout, page_tables)),
            layout.page_tables
        );
        assert_eq!(
            word(at + offset_of!(Layout, hammer_base)),
            layout.hammer_base
        );
    }
}
