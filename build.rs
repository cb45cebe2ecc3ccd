//! Links the release build of `vmm` without the tables for unwinding, which it never does.

use std::path::Path;

fn main() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/release.ld");
    println!("cargo:rerun-if-changed={}", script.display());
    // Tests unwind, and so does a build for a debugger.
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
    }
}
