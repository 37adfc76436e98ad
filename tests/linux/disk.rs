//! Disks: file systems and images that guests use, and what is left in them.

use std::fs::{self, File};
use std::path::Path;

use crate::guest::{Guest, Kernel, host, on_each_kernel};

/// Makes an ext4 image of 64 MiB which holds a file `greeting`.
fn ext4(directory: &Path) -> String {
    let tree = directory.join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("greeting"), "from the host\n").unwrap();
    let image = directory.join("disk.ext4");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let (from, to) = (tree.to_str().unwrap(), image.to_str().unwrap());
    host("mke2fs", &["-q", "-t", "ext4", "-d", from, to]);
    to.to_owned()
}

/// That `/many` of an image has 1,000 files, each with its own name as its content.
fn has_a_thousand_files(image: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let target = scratch.path().to_str().unwrap();
    host("debugfs", &["-R", &format!("rdump /many {target}"), image]);
    for number in 1..=1000 {
        let content = fs::read_to_string(scratch.path().join(format!("many/{number}")));
        assert_eq!(content.unwrap(), format!("{number}\n"));
    }
}

fn what_was_synced_survives_a_power_cut(kernel: Kernel) {
    let script = "mount -t ext4 /dev/vda /root; cat /root/greeting
        mkdir /root/many; for i in $(seq 1000); do echo $i >/root/many/$i; done
        sync; echo all is written
        while :; do head -c 100000 /dev/urandom >/root/more; done";
    let scratch = tempfile::tempdir().unwrap();
    let image = ext4(scratch.path());
    let mut guest = Guest::new(kernel, script)
        .with_modules()
        .flags(&["-c", "2", "--disk", &image])
        .running();
    guest.wait_for("from the host");
    guest.wait_for("all is written");
    guest.kill();
    // The journal is played back first, as a mount would.
    host("sh", &["-c", "e2fsck -p \"$0\" || [ $? = 1 ]", &image]);
    host("e2fsck", &["-f", "-n", &image]);
    has_a_thousand_files(&image);
}

fn a_qcow2_of_qemu_img_is_read_and_written(kernel: Kernel) {
    let script = "mount -t ext4 /dev/vda /root; cat /root/greeting
        mkdir /root/many; for i in $(seq 1000); do echo $i >/root/many/$i; done
        head -c 10000000 /dev/urandom >/root/random; sum=$(sha256sum </root/random)
        umount /root; echo 3 >/proc/sys/vm/drop_caches; mount -t ext4 /dev/vda /root
        [ \"$sum\" = \"$(sha256sum </root/random)\" ] && echo same=yes
        umount /root";
    let scratch = tempfile::tempdir().unwrap();
    let raw = ext4(scratch.path());
    let image = format!("{raw}.qcow2");
    host("qemu-img", &["convert", "-q", "-O", "qcow2", &raw, &image]);
    let disk = format!("{image},format=qcow2");
    let text = Guest::new(kernel, script)
        .with_modules()
        .flags(&["-c", "2", "--disk", &disk])
        .output();
    assert!(text.contains("from the host"), "{text}");
    assert!(text.contains("same=yes"), "{text}");
    host("qemu-img", &["check", "-q", &image]);
    host("qemu-img", &["convert", "-q", "-O", "raw", &image, &raw]);
    host("e2fsck", &["-f", "-n", &raw]);
    has_a_thousand_files(&raw);
}

on_each_kernel! {
    what_was_synced_survives_a_power_cut;
    a_qcow2_of_qemu_img_is_read_and_written;
}
