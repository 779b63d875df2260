//! The races of the memory protocol, each explored in every interleaving that loom can tell apart.
//!
//! The code under test is `vmm/src/mm` itself, compiled a second time against loom's atomics and locks. One
//! race a test, named after it; PROTOCOL.md section 8 G has the list.

#[allow(dead_code, unreachable_pub, unused_imports)]
#[path = "../../../vmm/src/mm/mod.rs"]
pub mod mm;

#[cfg(test)]
mod races;
