//! The host's side of memory: the frames' bytes, and the addresses KVM sees them at.
//!
//! | file | concept |
//! |---|---|
//! | `physmap` | all frames, mapped once, one after the other: `pfn -> host address`, never remapped |
//! | `window` | the host addresses a memslot points at: page `gfn` shows the frame its entry names |
//! | `shown` | what the pages of a window show, packed |
//! | `budget` | how many mappings the windows of this process may use |
//! | `maps` | what the kernel says is mapped where |
//! | `syscalls`, `call` | the system calls that change memory, and their names |
//! | `refusals` | has them refused, in builds with debug assertions |
//! | `private` | keeps both from child processes and core dumps |
//! | `prices` | what faults cost on this machine, by running averages |
//! | `limits` | how much this process may take of the host, and who says so |
//! | `idle` | work for CPU time that nobody else wants, by threads that hold locks |
//! | `ahead` | a thread that breaks ahead of the guest's writes |
//! | `stock` | a thread that has memory ready for copies |
//! | `at_once` | how much memory is asked for at a time |
//! | `stream` | copies of whole folios, past the caches |
//! | `space` | an address space without its policy |
//! | `ram` | guest memory by guest-physical address, for host code: every access holds what it touches |
//!
//! vCPUs go through the window and nobody else does. Everything of ours goes through the physmap, and is
//! volatile or atomic: guest bytes are never a Rust reference.

mod ahead;
mod aligned;
mod at_once;
mod budget;
mod call;
mod idle;
mod limits;
mod mapping;
mod maps;
mod physmap;
mod precedence;
mod prices;
mod private;
mod ram;
#[cfg(debug_assertions)]
mod refusals;
mod shown;
mod space;
mod stock;
mod stream;
mod syscalls;
mod vacant;
mod window;

#[cfg(test)]
pub(crate) mod tests;

pub use ahead::Ahead;
pub use budget::MappingBudget;
pub(crate) use idle::{IdleTurn, Spare};
pub use limits::{Limiter, Limits, Room};
pub use physmap::PhysMap;
pub use precedence::Precedence;
pub use prices::Prices;
pub use private::Dumps;
pub use ram::{PinnedBuffer, Ram, RamError, SlicePin};
pub use space::Space;
pub(crate) use stock::{Pauses, StockKeeper};
pub use window::{LOWEST, Placement, Window};
