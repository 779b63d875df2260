//! Reads an ELF file: its header and its program headers, and nothing else. The file is not trusted.

use linux_loader::elf;
use vm_memory::ByteValued;

use super::BootError;

/// Checks what kind of file this is.
pub(super) fn check_header(file: &[u8]) -> Result<elf::Elf64_Ehdr, BootError> {
    if !file.starts_with(elf::ELFMAG) {
        return Err(BootError::NotElf);
    }
    // The class says how long the header is, so it comes before the header's own length.
    let ident = |index: usize| file.get(index).copied();
    if ident(elf::EI_CLASS).is_some_and(|class| class != elf::ELFCLASS64)
        || ident(elf::EI_DATA).is_some_and(|data| data != elf::ELFDATA2LSB)
    {
        return Err(BootError::Not64Bit);
    }
    let header: elf::Elf64_Ehdr = read_at(file, 0, || "the ELF header".into())?;
    if header.e_machine != elf::EM_X86_64 {
        return Err(BootError::NotX86_64 {
            machine: header.e_machine,
        });
    }
    if header.e_type != elf::ET_EXEC {
        return Err(BootError::NotExecutable {
            kind: header.e_type,
        });
    }
    Ok(header)
}

/// Reads all program headers.
pub(super) fn program_headers(
    file: &[u8],
    header: &elf::Elf64_Ehdr,
) -> Result<Vec<elf::Elf64_Phdr>, BootError> {
    let size = size_of::<elf::Elf64_Phdr>() as u64;
    if header.e_phnum == 0 {
        return Err(BootError::Empty);
    }
    if u64::from(header.e_phentsize) != size {
        return Err(BootError::HeaderSize {
            size: header.e_phentsize,
        });
    }
    (0..u64::from(header.e_phnum))
        .map(|index| {
            let offset = header.e_phoff.saturating_add(index * size);
            read_at(file, offset, || format!("program header {index}"))
        })
        .collect()
}

/// Copies a `T` out of the file at `offset`.
fn read_at<T: ByteValued + Default>(
    file: &[u8],
    offset: u64,
    what: impl FnOnce() -> String,
) -> Result<T, BootError> {
    let bytes = within(file, offset, size_of::<T>() as u64, what)?;
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(bytes);
    Ok(value)
}

/// The `len` bytes of the file at `offset`.
pub(super) fn within(
    file: &[u8],
    offset: u64,
    len: u64,
    what: impl FnOnce() -> String,
) -> Result<&[u8], BootError> {
    let end = offset.saturating_add(len);
    let range = usize::try_from(offset).ok().zip(usize::try_from(end).ok());
    range
        .and_then(|(start, end)| file.get(start..end))
        .ok_or_else(|| BootError::Truncated {
            what: what(),
            end,
            len: file.len() as u64,
        })
}
