//! The races of the memory protocol, each explored in every interleaving that loom can tell apart.
//!
//! The code under test is `vmm/mm/src` itself, compiled a second time against loom's atomics and locks.
//!
//! | module | what is in it |
//! |---|---|
//! | `races` | the races, each generic over the policy; PROTOCOL.md section 8 G has the list |
//! | `hold` | with the protocol as it is, each race ends well |
//! | `safeguards` | with any one [`mm::Safeguard`] left out, loom finds a race that does not |
//! | `explore`, `child` | how a race is run, and how its failure is caught |
//! | `sync` | loom's atomics and locks, with a gap in loom mended |
//!
//! What loom cannot see: the count of an `Arc` (it is the standard library's), a compare-and-swap that fails
//! for no reason, and a load that is done after a later store of its own thread (it runs threads in program
//! order).

#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../../../vmm/mm/src/lib.rs"]
pub mod mm;
#[allow(unreachable_pub)]
mod sync;

#[cfg(test)]
mod child;
#[cfg(test)]
mod explore;
#[cfg(test)]
mod hold;
#[cfg(test)]
mod races;
#[cfg(test)]
mod safeguards;
