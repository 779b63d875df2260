//! Compiles the protocol with shuttle's atomics: this crate, and no other, has `--cfg shuttle`.

fn main() {
    println!("cargo::rustc-cfg=shuttle");
    println!("cargo::rerun-if-changed=build.rs");
}
