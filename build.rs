//! Builds what runs in guests, the kernels of `guest-kernels/` and the first process in `guest-init/`, and hands it to
//! the crate as bytes.
//!
//! Both are workspaces of their own, with their own compiler flags, so a second Cargo builds them. It must see nothing of
//! this build: flags that a person, a lint run, a coverage run or a fuzzer set for the VMM would break a kernel. Hence
//! the environment is cleaned, and Cargo runs inside the workspace, where `.cargo/config.toml` has the flags.
//!
//! Output: `$OUT_DIR/guest_kernels.rs` with `GUEST_KERNELS: &[(&str, &[u8])]`, names in alphabetical order, and
//! `$OUT_DIR/guest_init.rs` with `GUEST_INIT: &[u8]`.

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

/// The one target that the flags in the workspaces' `.cargo/config.toml` are written for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(variable("OUT_DIR"));

    let kernels = build(&root, "guest-kernels", &out);
    let names = names(&root.join("guest-kernels/src/bin"));
    let mut table = String::from("/// The guests of `guest-kernels/`: name and ELF image.\n");
    table.push_str("pub const GUEST_KERNELS: &[(&str, &[u8])] = &[\n");
    for name in &names {
        let image = kernels.join(name);
        table.push_str(&format!("    ({name:?}, include_bytes!({image:?})),\n"));
    }
    table.push_str("];\n");
    write(&out.join("guest_kernels.rs"), &table);

    // These it shares with the VMM.
    for shared in ["src/guest/plan.rs", "src/guest/protocol"] {
        println!("cargo::rerun-if-changed={}", root.join(shared).display());
    }
    let init = build(&root, "guest-init", &out).join("init");
    let constant = format!(
        "/// The program of `guest-init/`, a static ELF executable.\n\
         pub const GUEST_INIT: &[u8] = include_bytes!({init:?});\n"
    );
    write(&out.join("guest_init.rs"), &constant);
}

fn write(path: &Path, text: &str) {
    fs::write(path, text)
        .unwrap_or_else(|error| fail(&format!("cannot write {}: {error}", path.display())));
}

/// Builds the workspace called `name`, and returns the directory of its programs.
fn build(root: &Path, name: &str, out: &Path) -> PathBuf {
    let source = root.join(name);
    let target_dir = out.join(name);
    for input in [
        "src",
        "Cargo.toml",
        "Cargo.lock",
        "kernel.ld",
        ".cargo/config.toml",
    ] {
        let input = source.join(input);
        // A file that is not there would count as changed at every build.
        if input.exists() {
            println!("cargo::rerun-if-changed={}", input.display());
        }
    }
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
        .current_dir(&source)
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
        .arg(&target_dir);
    let output = cargo.output();
    let output =
        output.unwrap_or_else(|error| fail(&format!("cannot run cargo for {name}/: {error}")));
    if !output.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        fail(&format!(
            "{name}/ does not build; run `cargo build --release` in that directory to look closer"
        ));
    }
    target_dir.join(TARGET).join("release")
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
