//! Images as people have them, and as they should not.

use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;
use crate::worker::children;

pub(super) fn options(path: &Path) -> Options {
    Options {
        path: path.to_owned(),
        read_only: false,
        direct: false,
        format: Format::Raw,
        depth: 256,
    }
}

fn refusal(options: &Options) -> String {
    match Disk::open(options) {
        Ok(_) => panic!("{} was opened", options.path.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_no_disk_image_is_refused_in_a_sentence_that_names_it() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    std::fs::write(at("empty"), b"").unwrap();
    std::fs::write(at("odd"), [0; 1000]).unwrap();
    std::fs::write(at("good"), [0; 1024]).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    let cases = [
        (at("missing"), Format::Raw, "there is no disk image"),
        (at("dangling"), Format::Raw, "there is no disk image"),
        (at("good/part"), Format::Raw, "there is no disk image"),
        (at(""), Format::Raw, "is a directory"),
        (
            "/dev/null".into(),
            Format::Raw,
            "neither a file nor a block device",
        ),
        (at("empty"), Format::Raw, "is empty"),
        (at("empty"), Format::Qcow2, "is empty"),
        (at("odd"), Format::Raw, "no multiple of 512"),
        (at("good"), Format::Qcow2, "is not a qcow2 image"),
    ];
    for (path, format, words) in cases {
        let sentence = refusal(&Options {
            format,
            ..options(&path)
        });
        assert!(sentence.contains(words), "{sentence}");
        assert!(sentence.contains(path.to_str().unwrap()), "{sentence}");
        assert!(!sentence.contains('\n'), "{sentence}");
    }
}

#[test]
fn what_open_says_becomes_advice() {
    let writing = options(Path::new("disk.img"));
    let reading = Options {
        read_only: true,
        ..writing.clone()
    };
    let direct = Options {
        direct: true,
        ..writing.clone()
    };
    for (options, errno, words) in [
        (&writing, libc::EACCES, "no permission to write"),
        (&reading, libc::EACCES, "no permission to read"),
        (&writing, libc::EROFS, "add `,ro`"),
        (&direct, libc::EINVAL, "leave `direct` out"),
        (&writing, libc::EIO, "cannot use the disk image disk.img"),
    ] {
        let error = image::refusal(options, io::Error::from_raw_os_error(errno));
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn an_image_has_one_writer_or_any_number_of_readers() {
    let _closing = children::none();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("disk.img");
    std::fs::write(&path, [0; 1024]).unwrap();
    let writing = options(&path);
    let reading = Options {
        read_only: true,
        ..writing.clone()
    };
    let writer = Disk::open(&writing).unwrap();
    assert!(refusal(&writing).contains("in use by another VM"));
    assert!(refusal(&reading).contains("in use by another VM"));
    drop(writer);
    let readers = [Disk::open(&reading).unwrap(), Disk::open(&reading).unwrap()];
    assert!(refusal(&writing).contains("in use by another VM"));
    drop(readers);
    assert!(Disk::open_without_ring(&writing).is_ok());
}

#[test]
fn a_disk_checks_what_it_is_asked_for() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("disk.img");
    std::fs::write(&path, [0; 1024]).unwrap();
    let ram = crate::mem::allocate(&[(crate::mem::GuestAddress(0), 2 << 20)]).unwrap();
    let mut disk = Disk::open(&options(&path)).unwrap();
    assert_eq!((disk.capacity(), disk.sector()), (1024, 512));
    for (offset, len) in [(512, 1024), (u64::MAX, 1), (1, u64::MAX)] {
        let refused = disk.submit(0, &ram, Operation::Discard { offset, len });
        assert!(matches!(refused, Poll::Ready(Err(_))));
    }
    let closing = children::none();
    drop(disk);
    drop(closing);
    let read_only = Options {
        read_only: true,
        ..options(&path)
    };
    let mut disk = Disk::open(&read_only).unwrap();
    let discard = Operation::Discard {
        offset: 0,
        len: 512,
    };
    let refused = disk.submit(0, &ram, discard);
    assert!(matches!(refused, Poll::Ready(Err(_))));
}
