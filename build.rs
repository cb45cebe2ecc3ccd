//! Builds the guest's agent, which is a part of `vmm`, and links the release build of `vmm` without the tables for
//! unwinding, which it never does.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = root.join("resources/release.ld");
    for input in ["resources/release.ld", "crates/guest", "Cargo.lock", "Cargo.toml", ".cargo/config.toml"] {
        println!("cargo:rerun-if-changed={}", root.join(input).display());
    }
    // Tests unwind, and so does a build for a debugger.
    if env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
    }
    println!("cargo:rustc-env=VMM_AGENT={}", agent(root).display());
}

/// Builds the agent as it is for every profile of `vmm`, in a target folder of its own: the outer Cargo has a lock on its
/// own one.
fn agent(root: &Path) -> PathBuf {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("Cargo says where to put what is built"));
    // OUT_DIR is TARGET/TRIPLE/PROFILE/build/PACKAGE/out: the profiles share what is built here.
    let target = out.ancestors().nth(4).expect("OUT_DIR is deep in the target folder").join("agent");
    let mut cargo = Command::new(env::var_os("CARGO").expect("Cargo says where it is"));
    cargo.current_dir(root).args(["build", "--quiet", "--package", "guest", "--bin", "vmm-agent"]);
    cargo.args(["--profile", "agent", "--locked", "--target", TARGET, "--target-dir"]).arg(&target);
    // What is said about the outer build, such as clippy in the compiler's place, does not hold for this one.
    for variable in ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTC"] {
        cargo.env_remove(variable);
    }
    let status = cargo.status().expect("Cargo runs");
    assert!(status.success(), "the guest's agent could not be built: see above");
    target.join(TARGET).join("agent/vmm-agent")
}

/// The guests' architecture.
const TARGET: &str = "x86_64-unknown-linux-gnu";
