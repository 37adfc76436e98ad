//! A shared directory's speed: `find` and `tar` over a tree of many small files, with cold and with warm caches in the
//! guest, and as many files made anew; sarang's `--share`, and virtiofsd under `qemu-system-x86_64 -M microvm`, alternately
//! in one run. Run it with `cargo bench --bench share`; the guests run inside `scripts/kvm-anywhere`.

#[allow(dead_code)]
mod machines;

use std::fs;
use std::path::{Path, PathBuf};

use machines::{Comparison, RUNS, Virtiofsd, Vmm};
const DIRECTORIES: usize = 20;
/// In each directory.
const FILES: usize = 25;

const SCRIPT: &str = r#"
mkdir /tree; mount -t virtiofs tree /tree
took() { # WHAT COMMAND…
    what=$1; shift
    read -r up _ </proc/uptime; before=${up%.*}${up#*.}
    "$@"
    read -r up _ </proc/uptime; after=${up%.*}${up#*.}
    echo "result $what $(((after - before) * 10))"
}
all() { find /tree/source -type f | wc -l >/count; }
pack() { tar -cf - -C /tree source | wc -c >/count; }
make() { cp -r /tree/source/1 /tree/source/2 /tree/source/3 /tree/source/4 /tree/new; }
rm -rf /tree/new; mkdir /tree/new
took "find, cold" all
took "tar, cold" pack
took "find, warm" all
took "tar, warm" pack
took "make files" make
"#;

fn main() {
    if let Some((vmm, assets)) = machines::this_turn() {
        return guest(vmm, &assets);
    }
    let names = [
        "find, cold",
        "tar, cold",
        "find, warm",
        "tar, warm",
        "make files",
    ];
    let mut figures = names.map(|name| Comparison::new(name, "ms", false));
    machines::take_turns(
        &mut figures,
        &[
            machines::asset("build-guest-kernel", "SARANG_GUEST_KERNEL"),
            machines::asset("guest-assets", "SARANG_INITRD"),
        ],
    );
    println!(
        "a tree of {} files, 1 vCPU, median of {RUNS}, and how many times better sarang is:",
        DIRECTORIES * FILES
    );
    figures.iter_mut().for_each(Comparison::print);
}

/// Files of 0 to 16 KiB, most of them small, as in a source tree.
fn make_tree(root: &Path) {
    for directory in 0..DIRECTORIES {
        let directory = root.join("source").join(directory.to_string());
        fs::create_dir_all(&directory).expect("room for a tree");
        for file in 0..FILES {
            let len = 16 * file * file;
            fs::write(directory.join(file.to_string()), vec![b'x'; len]).expect("room for a tree");
        }
    }
}

/// Inside: one guest, which prints its figures.
fn guest(vmm: Vmm, assets: &[PathBuf]) {
    let [kernel, busybox] = assets else {
        panic!("a kernel and an initramfs");
    };
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let tree = scratch.path().join("tree");
    make_tree(&tree);
    let initrd = machines::initrd(scratch.path(), std::slice::from_ref(busybox), SCRIPT);
    // Not two: an emulated machine seldom carries them through a tar (see scripts/kvm-anywhere).
    let mut line = vmm.linux(kernel, &initrd, 1);
    let _daemon = match vmm {
        Vmm::Sarang => {
            line.extend(["--share".to_owned(), format!("{},tag=tree", tree.display())]);
            None
        }
        Vmm::Qemu => {
            let daemon = Virtiofsd::start(scratch.path(), &tree).expect("virtiofsd is installed");
            line.extend(daemon.flags("tree"));
            Some(daemon)
        }
    };
    machines::show(&line);
}
