//! What goes wrong, by operation.
//!
//! | file | operation |
//! |---|---|
//! | `machine` | making a machine, and driving it |
//! | `state` | capturing and setting registers |
//! | `run` | going on with a vCPU |
//! | `write_fault` | finding the pages of a write fault |

mod machine;
mod run;
mod state;
mod write_fault;

pub(super) use machine::PATIENCE;
pub use machine::{KvmError, MAX_VCPUS};
pub use run::VcpuRunError;
pub use state::StateError;
pub use write_fault::WriteFaultError;
