//! Images that are not plain files through the page cache: `O_DIRECT`, and qcow2 as qemu-img makes and judges it.

use std::os::unix::fs::FileExt;
use std::process::Command;

use super::*;
use crate::worker::children;

#[test]
fn a_direct_disk_reads_and_writes_or_is_refused_with_the_reason() {
    // The build directory is on a disk, where the directory for temporary files often is not.
    let scratch = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = scratch.path().join("disk.img");
    std::fs::write(&path, vec![0xaa; 1 << 20]).unwrap();
    let direct = Options {
        direct: true,
        ..options(&path)
    };
    let disk = match Disk::open(&direct) {
        Ok(disk) => disk,
        Err(error) => {
            assert!(error.to_string().contains("leave `direct` out"), "{error}");
            return;
        }
    };
    let mut device = Block::new(disk, settings()).unwrap();
    let features = device.features();
    let mut driver = Driver::start(&mut device, features);
    // Linux aligns its buffers to sectors, which is all that most hosts want for this.
    let (at, data, status) = (16 * MIB, 16 * MIB + 4096, 16 * MIB + 8192);
    let ram = driver.ram.clone();
    ram.write_slice(&header(T_OUT, 8), GuestAddress(at))
        .unwrap();
    ram.write_slice(&[5; 4096], GuestAddress(data)).unwrap();
    driver.send_raw(0, &[(at, 16, 0), (data, 4096, 0), (status, 1, 2)]);
    device.process(0).unwrap();
    while driver.used(0).is_none() {
        wait(&mut device).unwrap();
    }
    assert_eq!(ram.read_obj::<u8>(GuestAddress(status)).unwrap(), OK);
    let file = std::fs::read(&path).unwrap();
    assert!(file[4096..8192].iter().all(|byte| *byte == 5));
}

fn qemu_img(arguments: &[&str]) -> Option<String> {
    let _child = children::some();
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{arguments:?}: {text}{errors}");
            Some(text)
        }
        Err(_) => {
            eprintln!("qemu-img is missing: no qcow2 image to test with");
            None
        }
    }
}

#[test]
fn a_qcow2_image_works_like_a_raw_one_and_stays_sound() {
    for compat in ["compat=1.1", "compat=0.10"] {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("disk.qcow2");
        let name = path.to_str().unwrap();
        if qemu_img(&["create", "-q", "-f", "qcow2", "-o", compat, name, "64M"]).is_none() {
            return;
        }
        let mut options = options(&path);
        options.format = Format::Qcow2;
        let device = Block::new(Disk::open(&options).unwrap(), settings()).unwrap();
        let mut rig = Rig {
            driver: Driver::start(&mut Rig::plain(MIB).device, 0),
            device,
            path: path.clone(),
            _scratch: scratch,
        };
        let features = rig.device.features();
        rig.driver = Driver::start(&mut rig.device, features);
        let data = pattern(300 << 10);
        let last = (64 << 20) / 512 - 1;
        assert_eq!(
            rig.status(T_OUT, 100, &[&data[..700], &data[700..]], &[]),
            OK
        );
        assert_eq!(rig.status(T_OUT, last, &[&[3; 512]], &[]), OK);
        assert_eq!(rig.status(T_OUT, last + 1, &[&[3; 512]], &[]), IOERR);
        assert_eq!(rig.status(T_FLUSH, 0, &[], &[]), OK);
        let (status, bytes, _) = rig.ask(T_IN, 100, &[], &[1000, (300 << 10) - 1000]);
        assert!(status == OK && bytes == data);
        assert_eq!(rig.ask(T_IN, 50_000, &[], &[512]).1, [0; 512]);
        assert_eq!(rig.status(T_DISCARD, 0, &[&segment(256, 128, 0)], &[]), OK);
        for flags in [0, 1] {
            let zeroes = segment(130, 300, flags);
            assert_eq!(rig.status(T_WRITE_ZEROES, 0, &[&zeroes], &[]), OK);
            assert!(
                rig.ask(T_IN, 130, &[], &[300 * 512])
                    .1
                    .iter()
                    .all(|byte| *byte == 0)
            );
            assert_eq!(rig.status(T_OUT, 200, &[&data[..512]], &[]), OK);
        }
        assert!(Disk::open(&options).is_err(), "it is locked");
        drop(rig.device);
        assert!(qemu_img(&["check", name]).unwrap().contains("No errors"));
        let raw = path.with_extension("raw");
        qemu_img(&["convert", "-O", "raw", name, raw.to_str().unwrap()]);
        let bytes = &mut [0; 512];
        File::open(&raw)
            .unwrap()
            .read_exact_at(bytes, last * 512)
            .unwrap();
        assert_eq!(*bytes, [3; 512]);
        File::open(&raw)
            .unwrap()
            .read_exact_at(bytes, 100 * 512)
            .unwrap();
        assert_eq!(*bytes, data[..512]);
    }
}

#[test]
fn a_qcow2_image_may_not_choose_files_of_the_host() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    let (secret, overlay, data) = (at("secret.img"), at("overlay.qcow2"), at("data.raw"));
    std::fs::write(&secret, vec![9; 1 << 20]).unwrap();
    let create = ["create", "-q", "-f", "qcow2"];
    if qemu_img(&[&create[..], &["-b", &secret, "-F", "raw", &overlay]].concat()).is_none() {
        return;
    }
    let external = at("external.qcow2");
    let place = format!("data_file={data}");
    qemu_img(&[&create[..], &["-o", &place, &external, "1M"]].concat());
    let _closing = children::none();
    for (image, other) in [(overlay, secret), (external, data)] {
        for read_only in [false, true] {
            let options = Options {
                format: Format::Qcow2,
                read_only,
                ..options(Path::new(&image))
            };
            let error = Disk::open(&options).err().unwrap().to_string();
            assert!(error.contains(&image) && error.contains(&other), "{error}");
            assert!(error.contains("does not open unasked"), "{error}");
        }
    }
}
