//! A guest program that was checked, and loading it.
//!
//! A program that is no static one, or is linked where none may be, is refused with the reason, before
//! anything is loaded. Of a program only the ELF header and what is loaded matter: notes, sections and debug
//! information may be anything.

use std::ops::Range;

use linux_loader::elf;

use super::BootError;
use super::elf::{check_header, program_headers, within};
use crate::kvm::memory::GuestRam;

/// A guest program that was checked.
#[derive(Clone, Debug)]
pub struct Image {
    file: Vec<u8>,
    entry: u64,
    end: u64,
    /// Bytes of the file that go into memory. The rest of the image is zero.
    loaded: Vec<Loaded>,
    /// What of it the program may write.
    writable: Vec<Range<u64>>,
}

/// A part of the file that goes into memory.
#[derive(Clone, Copy, Debug)]
struct Loaded {
    /// Where it begins in the file. All of it is in the file.
    offset: u64,
    /// Where it goes.
    gpa: u64,
    len: u64,
}

impl Image {
    /// Checks that `file` is a program a guest can run, all of it at addresses in `place`.
    ///
    /// # Errors
    /// If it is none, or has no place: see [`BootError`].
    pub fn parse(file: impl Into<Vec<u8>>, place: Range<u64>) -> Result<Self, BootError> {
        let file = file.into();
        let header: elf::Elf64_Ehdr = check_header(&file)?;
        let segments = program_headers(&file, &header)?;

        let mut end = 0;
        let (mut loaded, mut writable) = (Vec::new(), Vec::new());
        let mut entry_found = false;
        for (segment, phdr) in segments.iter().enumerate() {
            match phdr.p_type {
                elf::PT_LOAD => {}
                elf::PT_DYNAMIC | elf::PT_INTERP => {
                    return Err(BootError::Dynamic { header: segment });
                }
                _ => continue,
            }
            let (offset, filesz) = (phdr.p_offset, phdr.p_filesz);
            let start = phdr.p_vaddr;
            let memory = phdr.p_memsz;
            if filesz != 0 {
                within(&file, offset, filesz, || {
                    format!("program header {segment}")
                })?;
            }
            if memory == 0 && filesz == 0 {
                continue;
            }
            if phdr.p_paddr != start {
                return Err(BootError::SegmentMoved {
                    segment,
                    start,
                    load: phdr.p_paddr,
                });
            }
            if start < place.start {
                return Err(BootError::SegmentTooLow {
                    lowest: place.start,
                    segment,
                    start,
                });
            }
            let segment_end = start.checked_add(memory).filter(|end| *end <= place.end);
            let (Some(segment_end), true) = (segment_end, filesz <= memory) else {
                return Err(BootError::SegmentSize {
                    segment,
                    start,
                    file: filesz,
                    memory,
                });
            };
            end = end.max(segment_end);
            entry_found |= (start..segment_end).contains(&header.e_entry);
            if filesz != 0 {
                loaded.push(Loaded {
                    offset,
                    gpa: start,
                    len: filesz,
                });
            }
            if phdr.p_flags & elf::PF_W != 0 {
                writable.push(start..segment_end);
            }
        }
        if end == 0 {
            return Err(BootError::Empty);
        }
        if !entry_found {
            return Err(BootError::Entry {
                entry: header.e_entry,
            });
        }
        Ok(Self {
            file,
            entry: header.e_entry,
            end,
            loaded,
            writable,
        })
    }

    /// Addresses of the program that it may write, by its segments.
    pub fn writable(&self) -> &[Range<u64>] {
        &self.writable
    }

    /// Address of the first instruction.
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// The gpa behind the program, its zeroed data included.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Copies the program into guest memory, which must be zero where the program lies.
    ///
    /// # Errors
    /// If it does not fit into memory, or memory cannot be written. Part of it may have been.
    pub fn load(&self, ram: &dyn GuestRam) -> Result<(), BootError> {
        if self.end > ram.len() {
            return Err(BootError::TooLarge {
                end: self.end,
                memory: ram.len(),
            });
        }
        for part in &self.loaded {
            let bytes = within(&self.file, part.offset, part.len, || "a segment".into())?;
            ram.write(part.gpa, bytes)
                .map_err(|source| BootError::Memory {
                    gpa: part.gpa,
                    source,
                })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::paging::tests::Bytes as Ram;
    use guest::abi::IMAGE_GPA;

    const PLACE: Range<u64> = IMAGE_GPA..128 << 30;

    /// Offset of the first program header in [`file`].
    const PHDR: usize = 64;

    /// A small good program: one segment with 16 bytes of code at [`IMAGE_GPA`] and a page of memory.
    fn file() -> Vec<u8> {
        let mut file = vec![0; PHDR + 56];
        file[..4].copy_from_slice(b"\x7fELF");
        file[4..7].copy_from_slice(&[2, 1, 1]);
        put(&mut file, 16, 2, 2); // e_type
        put(&mut file, 18, 62, 2); // e_machine
        put(&mut file, 20, 1, 4); // e_version
        put(&mut file, 24, IMAGE_GPA + 4, 8); // e_entry
        put(&mut file, 32, PHDR as u64, 8); // e_phoff
        put(&mut file, 52, 64, 2); // e_ehsize
        put(&mut file, 54, 56, 2); // e_phentsize
        put(&mut file, 56, 1, 2); // e_phnum
        put(&mut file, PHDR, 1, 4); // p_type
        put(&mut file, PHDR + 4, 7, 4); // p_flags: writable and executable
        put(&mut file, PHDR + 8, PHDR as u64 + 56, 8); // p_offset
        put(&mut file, PHDR + 16, IMAGE_GPA, 8); // p_vaddr
        put(&mut file, PHDR + 24, IMAGE_GPA, 8); // p_paddr
        put(&mut file, PHDR + 32, 16, 8); // p_filesz
        put(&mut file, PHDR + 40, 4096, 8); // p_memsz
        file.extend(1..=16);
        file
    }

    fn put(file: &mut [u8], offset: usize, value: u64, len: usize) {
        file[offset..offset + len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn refused(offset: usize, value: u64, len: usize) -> BootError {
        let mut file = file();
        put(&mut file, offset, value, len);
        Image::parse(file, PLACE).unwrap_err()
    }

    #[test]
    fn good_program_loads() {
        let image = Image::parse(file(), PLACE).unwrap();
        assert_eq!(image.entry(), IMAGE_GPA + 4);
        assert_eq!(image.end(), IMAGE_GPA + 4096);
        let ram = Ram::new(4 << 20);
        image.load(&ram).unwrap();
        let mut bytes = [0; 18];
        ram.read(IMAGE_GPA, &mut bytes).unwrap();
        assert_eq!(bytes[..16], (1..=16).collect::<Vec<u8>>());
        assert_eq!(bytes[16..], [0, 0]);
    }

    #[test]
    fn bad_notes_do_not_matter() {
        let note = PHDR + 56;
        let mut file = file();
        file.splice(note..note, [0; 56]);
        put(&mut file, 56, 2, 2); // e_phnum
        put(&mut file, PHDR + 8, note as u64 + 56, 8); // p_offset
        put(&mut file, note, 4, 4); // p_type: PT_NOTE
        // Beyond the end of the file; and in it, but nonsense.
        for (offset, len) in [(1 << 40, 999), (0, 64), (u64::MAX, u64::MAX)] {
            put(&mut file, note + 8, offset, 8); // p_offset
            put(&mut file, note + 32, len, 8); // p_filesz
            let ram = Ram::new(4 << 20);
            Image::parse(file.clone(), PLACE)
                .unwrap()
                .load(&ram)
                .unwrap();
            let mut bytes = [0; 16];
            ram.read(IMAGE_GPA, &mut bytes).unwrap();
            assert_eq!(bytes[..], (1..=16).collect::<Vec<u8>>());
        }
    }

    #[test]
    fn program_larger_than_memory_is_refused() {
        let image = Image::parse(file(), PLACE).unwrap();
        let error = image.load(&Ram::new(IMAGE_GPA + 4095)).unwrap_err();
        assert!(matches!(error, BootError::TooLarge { .. }));
    }

    #[test]
    fn every_malformation_has_its_own_error() {
        assert!(matches!(refused(0, 0, 4), BootError::NotElf));
        assert!(matches!(refused(4, 1, 1), BootError::Not64Bit));
        assert!(matches!(refused(5, 2, 1), BootError::Not64Bit));
        assert!(matches!(
            refused(16, 3, 2),
            BootError::NotExecutable { kind: 3 }
        ));
        assert!(matches!(
            refused(18, 183, 2),
            BootError::NotX86_64 { machine: 183 }
        ));
        assert!(matches!(refused(24, 0x1000, 8), BootError::Entry { .. }));
        assert!(matches!(
            refused(32, u64::MAX, 8),
            BootError::Truncated { .. }
        ));
        assert!(matches!(
            refused(54, 32, 2),
            BootError::HeaderSize { size: 32 }
        ));
        assert!(matches!(refused(56, 0, 2), BootError::Empty));
        assert!(matches!(
            refused(56, 9, 2),
            BootError::Truncated { .. } | BootError::SegmentSize { .. }
        ));
        assert!(matches!(
            refused(PHDR, 2, 4),
            BootError::Dynamic { header: 0 }
        ));
        assert!(matches!(
            refused(PHDR, 3, 4),
            BootError::Dynamic { header: 0 }
        ));
        assert!(matches!(refused(PHDR, 4, 4), BootError::Empty));
        assert!(matches!(
            refused(PHDR + 8, 1 << 40, 8),
            BootError::Truncated { .. }
        ));
        assert!(matches!(
            refused(PHDR + 24, IMAGE_GPA + 4096, 8),
            BootError::SegmentMoved { .. }
        ));
        assert!(matches!(
            refused(PHDR + 32, 17, 8),
            BootError::Truncated { .. }
        ));
        assert!(matches!(
            refused(PHDR + 40, 15, 8),
            BootError::SegmentSize { .. }
        ));
        assert!(matches!(
            refused(PHDR + 40, u64::MAX, 8),
            BootError::SegmentSize { .. }
        ));
        let mut low = file();
        put(&mut low, PHDR + 16, IMAGE_GPA - 4096, 8);
        put(&mut low, PHDR + 24, IMAGE_GPA - 4096, 8);
        assert!(matches!(
            Image::parse(low, PLACE).unwrap_err(),
            BootError::SegmentTooLow { segment: 0, .. }
        ));
    }

    #[test]
    fn no_cut_or_changed_file_panics() {
        let ram = Ram::new(4 << 20);
        let good = file();
        for len in 0..good.len() {
            assert!(Image::parse(&good[..len], PLACE).is_err(), "cut at {len}");
        }
        for offset in 0..PHDR + 56 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut file = file();
                file[offset] = value;
                if let Ok(image) = Image::parse(file, PLACE)
                    && image.end() <= ram.len()
                {
                    let _ = image.load(&ram);
                }
            }
        }
    }
}
