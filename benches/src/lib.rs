//! What benchmarks are made of.
//!
//! | module | concept |
//! |---|---|
//! | [`bare`] | memory without a guest, for the criterion benches of `mm` and of the window |
//! | [`technique`] | ways to take a snapshot: ours, and those it is measured against, behind one trait |
//! | [`vm`] | the measuring guest, running on the memory of any technique |
//! | [`measure`] | one technique, one size, one pattern: pause, stall, throughput, memory |
//! | [`machine`] | what this machine does without a guest: plain copies, pins |
//! | [`report`], [`json_file`] | the numbers of a run; the file they are kept in |
//! | [`targets`] | what the numbers should be |
//! | [`verdict`] | one target, and whether it was met |
//! | [`text`] | the same for people |
//! | [`summary`], [`footprint`], [`heap`] | percentiles; memory of processes; memory of tables |
//! | [`clones`] | what clones of a running VM cost |
//! | [`copies`] | ways to make a copy of a running VM that runs |
//! | [`kept`] | what keeping snapshots as files costs |
//! | [`stress`] | loops that must leave nothing behind |
//! | [`console`] | progress, Ctrl-C, and how a program ends |
//!
//! `benches/snapshot.rs`, `clone.rs`, `kept.rs` and `stress.rs` put them together.

#[cfg(test)]
mod alone;
pub mod bare;
pub mod clones;
pub mod console;
pub mod copies;
pub mod footprint;
pub mod heap;
pub mod json_file;
pub mod kept;
pub mod machine;
pub mod measure;
pub mod report;
pub mod stress;
pub mod summary;
pub mod targets;
pub mod technique;
pub mod text;
pub mod verdict;
pub mod vm;
