//! What an instruction does to memory: what it should, and nothing else near it.

/// Bytes before and behind its address that an instruction may write, and that are checked.
const WINDOW: usize = 128;

/// Executes instructions; the operands come after a semicolon.
macro_rules! execute {
    ($($code:literal),+; $($operands:tt)*) => {
        // SAFETY: writes within the window around the test's address, which is hammered memory and no Rust
        // object; leaves the direction flag clear and the stack pointer as it was.
        unsafe { core::arch::asm!($($code,)+ $($operands)*) }
    };
}
pub(crate) use execute;

/// Whether `write` makes `new` of the old value at `at`, and changes nothing else near it.
pub fn changes<T: Copy>(
    at: *mut u8,
    new: impl FnOnce(T) -> T,
    write: impl FnOnce(*mut u8),
) -> bool {
    let mut expected = window(at);
    let value = expected[WINDOW..][..size_of::<T>()]
        .as_mut_ptr()
        .cast::<T>();
    // SAFETY: the slice has the size of a `T`, and `T` is an integer or an array of them: any bytes are one.
    unsafe { value.write_unaligned(new(value.read_unaligned())) };
    write(at);
    window(at) == expected
}

/// Whether `write` puts `value` at `at`, and changes nothing else near it.
pub fn puts<T: Copy>(at: *mut u8, value: T, write: impl FnOnce(*mut u8)) -> bool {
    changes(at, |_| value, write)
}

/// The bytes around `at`. Out of line, so that the compiler does not unroll it into every test.
#[inline(never)]
fn window(at: *mut u8) -> [u8; 2 * WINDOW] {
    let window = at.wrapping_sub(WINDOW).cast::<[u8; 2 * WINDOW]>();
    // SAFETY: tests are given addresses that have the window around them inside the hammered memory. No
    // device writes there, and what the tests execute clobbers memory.
    unsafe { window.read() }
}
