//! Guest programs of a few instructions, as ELF files.

use guest::abi::{IMAGE_GPA, PORT_CONSOLE};

/// Bytes of an ELF header, and of the one program header behind it.
pub(crate) const EHDR: usize = 64;
pub(crate) const PHDR: usize = 56;

/// A program that is nothing but `code`, followed by zeros up to the end of a page.
pub(crate) fn program(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; EHDR + PHDR];
    put(&mut file, 0, *b"\x7fELF\x02\x01\x01\x00");
    put(&mut file, 16, 2u16.to_le_bytes()); // e_type: ET_EXEC
    put(&mut file, 18, 62u16.to_le_bytes()); // e_machine: x86-64
    put(&mut file, 20, 1u32.to_le_bytes()); // e_version
    put(&mut file, 24, IMAGE_GPA.to_le_bytes()); // e_entry
    put(&mut file, 32, (EHDR as u64).to_le_bytes()); // e_phoff
    put(&mut file, 52, (EHDR as u16).to_le_bytes()); // e_ehsize
    put(&mut file, 54, (PHDR as u16).to_le_bytes()); // e_phentsize
    put(&mut file, 56, 1u16.to_le_bytes()); // e_phnum
    put(&mut file, EHDR, 1u32.to_le_bytes()); // p_type: PT_LOAD
    put(&mut file, EHDR + 4, 7u32.to_le_bytes()); // p_flags
    put(&mut file, EHDR + 8, ((EHDR + PHDR) as u64).to_le_bytes()); // p_offset
    put(&mut file, EHDR + 16, IMAGE_GPA.to_le_bytes()); // p_vaddr
    put(&mut file, EHDR + 24, IMAGE_GPA.to_le_bytes()); // p_paddr
    put(&mut file, EHDR + 32, (code.len() as u64).to_le_bytes()); // p_filesz
    put(&mut file, EHDR + 40, 4096u64.to_le_bytes()); // p_memsz
    file.extend(code);
    file
}

/// Writes bytes into a file.
pub(crate) fn put<const N: usize>(file: &mut [u8], offset: usize, value: [u8; N]) {
    file[offset..offset + N].copy_from_slice(&value);
}

/// A program that never stops talking.
pub(crate) fn talker() -> Vec<u8> {
    // mov edx, port; mov eax, gpa of the text; out dx, eax; jmp to the out
    let mut code = vec![0xba];
    code.extend(u32::from(PORT_CONSOLE).to_le_bytes());
    code.push(0xb8);
    code.extend((IMAGE_GPA as u32 + 32).to_le_bytes());
    code.extend(b"\xef\xeb\xfd");
    code.resize(32, 0);
    // A text: where, and how long. It is this program, and no UTF-8.
    code.extend(IMAGE_GPA.to_le_bytes());
    code.extend(48u64.to_le_bytes());
    program(&code)
}
