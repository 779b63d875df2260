//! Compiles the protocol with loom's atomics: this crate, and no other, has `--cfg loom`.

fn main() {
    println!("cargo::rustc-cfg=loom");
    println!("cargo::rerun-if-changed=build.rs");
}
