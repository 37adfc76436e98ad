//! Builds the guests of `guest-kernels/` and hands them to the crate as one table of bytes.
//!
//! They are bare-metal programs in a workspace of their own, with their own compiler flags, so a second Cargo builds
//! them. It must see nothing of this build: flags that a person, a lint run, a coverage run or a fuzzer set for the
//! VMM would break a kernel. Hence the environment is cleaned, and Cargo runs inside `guest-kernels/`, where
//! `.cargo/config.toml` has the flags.
//!
//! Output: `$OUT_DIR/guest_kernels.rs` with `GUEST_KERNELS: &[(&str, &[u8])]`, names in alphabetical order.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Variables of the outer build that stay: where programs and the registry are, and which toolchain runs.
const KEPT: [&str; 4] = [
    "CARGO_HOME",
    "CARGO_NET_OFFLINE",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
];

/// The one target that the flags in `guest-kernels/.cargo/config.toml` are written for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let source = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("guest-kernels");
    let out = PathBuf::from(variable("OUT_DIR"));
    let target_dir = out.join("guest-kernels");

    println!("cargo::rerun-if-changed=build.rs");
    for input in [
        "src",
        "Cargo.toml",
        "Cargo.lock",
        "kernel.ld",
        ".cargo/config.toml",
    ] {
        println!("cargo::rerun-if-changed={}", source.join(input).display());
    }

    build(&source, &target_dir);

    let names = names(&source.join("src/bin"));
    let mut table = String::from("/// The guests of `guest-kernels/`: name and ELF image.\n");
    table.push_str("pub const GUEST_KERNELS: &[(&str, &[u8])] = &[\n");
    for name in &names {
        let image = target_dir.join(TARGET).join("release").join(name);
        table.push_str(&format!("    ({name:?}, include_bytes!({image:?})),\n"));
    }
    table.push_str("];\n");
    let path = out.join("guest_kernels.rs");
    fs::write(&path, table)
        .unwrap_or_else(|error| fail(&format!("cannot write {}: {error}", path.display())));
}

fn build(source: &Path, target_dir: &Path) {
    let mut cargo = Command::new(variable("CARGO"));
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        let of_outer_build = [
            "CARGO",
            "RUSTC",
            "RUSTDOC",
            "RUSTFLAGS",
            "CLIPPY",
            "LLVM_PROFILE",
            "__CARGO",
        ]
        .iter()
        .any(|prefix| name.starts_with(prefix));
        if of_outer_build && !KEPT.contains(&name) {
            cargo.env_remove(name);
        }
    }
    // Naming the target fixes the place of the output, whatever `build.target` a person's own settings have.
    cargo
        .current_dir(source)
        .args([
            "build",
            "--release",
            "--locked",
            "--offline",
            "--quiet",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(target_dir);
    let output = cargo.output();
    let output = output
        .unwrap_or_else(|error| fail(&format!("cannot run cargo for guest-kernels/: {error}")));
    if !output.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        fail(
            "guest-kernels/ does not build; run `cargo build --release` in that directory to look closer",
        );
    }
}

/// Each file in `src/bin` is a guest of that name.
fn names(directory: &Path) -> Vec<String> {
    let files = fs::read_dir(directory)
        .unwrap_or_else(|error| fail(&format!("cannot list {}: {error}", directory.display())));
    let mut names: Vec<String> = files
        .filter_map(|file| {
            file.ok()?
                .file_name()
                .to_str()?
                .strip_suffix(".rs")
                .map(String::from)
        })
        .collect();
    names.sort();
    names
}

fn variable(name: &str) -> std::ffi::OsString {
    env::var_os(name).unwrap_or_else(|| fail(&format!("cargo did not set {name}")))
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    std::process::exit(1)
}
