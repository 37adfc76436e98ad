//! A driver's day with a disk: good requests, odd ones and hostile ones, on every kind of image.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

use super::*;
use crate::backend::disk::{Format, Options};
use crate::virtio::driver::{Driver, Used};
use crate::virtio::{F_EVENT_IDX, TRANSPORT_FEATURES};
use vm_memory::Address;

const MIB: u64 = 1 << 20;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// How the image is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Ring,
    Thread,
}

fn options(path: &Path) -> Options {
    Options {
        path: path.to_owned(),
        read_only: false,
        direct: false,
        format: Format::Raw,
        depth: 256,
    }
}

fn settings() -> Settings {
    Settings {
        name: "BLK0".to_owned(),
        serial: "number 1".to_owned(),
        queues: 1,
        limits: Limits::default(),
    }
}

/// A disk with a driver that has accepted all it offers.
struct Rig {
    device: Block,
    driver: Driver,
    path: PathBuf,
    _scratch: TempDir,
}

impl Rig {
    /// A raw image of `len` bytes of 0xaa.
    fn new(len: u64, way: Way, change: impl FnOnce(&mut Options, &mut Settings)) -> Rig {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("disk.img");
        std::fs::write(&path, vec![0xaa; len as usize]).unwrap();
        let (mut options, mut settings) = (options(&path), settings());
        change(&mut options, &mut settings);
        let disk = match way {
            Way::Ring => Disk::open(&options).unwrap(),
            Way::Thread => Disk::open_without_ring(&options).unwrap(),
        };
        let mut device = Block::new(disk, settings).unwrap();
        let features = device.features() | TRANSPORT_FEATURES;
        let driver = Driver::start(&mut device, features);
        Rig {
            device,
            driver,
            path,
            _scratch: scratch,
        }
    }

    fn plain(len: u64) -> Rig {
        Rig::new(len, Way::Ring, |_, _| {})
    }

    /// Makes a request available on queue 0: its head.
    fn send(&mut self, kind: u32, sector: u64, out: &[&[u8]], into: &[u32]) -> u16 {
        let header = header(kind, sector);
        let mut readable = vec![&header[..]];
        readable.extend(out);
        let mut writable = into.to_vec();
        writable.push(1);
        self.driver.send(0, &readable, &writable)
    }

    /// Waits until one of the device's descriptors is ready, and tells it.
    fn wait(&mut self) {
        wait(&mut self.device).unwrap();
    }

    /// The next request handed back.
    fn used(&mut self) -> Used {
        loop {
            if let Some(used) = self.driver.used(0) {
                return used;
            }
            self.wait();
        }
    }

    /// A request from beginning to end: its status, the bytes before it, and the length that the device told.
    fn ask(&mut self, kind: u32, sector: u64, out: &[&[u8]], into: &[u32]) -> (u8, Vec<u8>, u32) {
        let head = self.send(kind, sector, out, into);
        self.device.process(0).unwrap();
        let used = self.used();
        assert_eq!(used.head, head);
        let mut bytes = self.driver.written(0, head);
        let status = bytes.pop().unwrap();
        (status, bytes, used.len)
    }

    fn status(&mut self, kind: u32, sector: u64, out: &[&[u8]], into: &[u32]) -> u8 {
        self.ask(kind, sector, out, into).0
    }

    fn file(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(&self.path)
            .unwrap()
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&sectors.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}

fn wait(device: &mut Block) -> Result<(), Malformed> {
    let sources = device.sources();
    let mut fds: Vec<PollFd<'_>> = sources
        .iter()
        .map(|fd| PollFd::new(fd, PollFlags::IN))
        .collect();
    let timeout = Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    assert!(poll(&mut fds, Some(&timeout)).unwrap() > 0, "lost request");
    let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    for (source, ready) in ready.into_iter().enumerate() {
        if ready {
            device.ready(source, Interest::READ)?;
        }
    }
    Ok(())
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8).collect()
}

#[test]
fn what_is_written_and_flushed_is_read_back_and_in_the_file() {
    for way in [Way::Ring, Way::Thread] {
        let mut rig = Rig::new(MIB, way, |_, _| {});
        let data = pattern(4096);
        // Pieces of every size: only their sum counts.
        let pieces = [&data[..1], &data[1..600], &data[600..]];
        assert_eq!(rig.ask(T_OUT, 8, &pieces, &[]), (OK, vec![], 1), "{way:?}");
        assert_eq!(rig.status(T_FLUSH, 0, &[], &[]), OK);
        let (status, bytes, len) = rig.ask(T_IN, 7, &[], &[1000, 24, 4096]);
        assert_eq!((status, len), (OK, 5121));
        assert_eq!(bytes[..512], [0xaa; 512]);
        assert!(bytes[512..512 + 4096] == data[..]);
        assert_eq!(bytes[4608..], [0xaa; 512]);
        let file = std::fs::read(&rig.path).unwrap();
        assert!(file[4096..8192] == data[..]);
        assert!(rig.driver.line.edges() > 0);
    }
}

#[test]
fn the_configuration_space_tells_the_disks_shape() {
    let rig = Rig::new(MIB, Way::Ring, |_, settings| settings.queues = 4);
    let read = |offset, len| {
        let mut bytes = vec![0; len];
        rig.device.read_config(offset, &mut bytes);
        bytes
    };
    assert_eq!(read(0, 8), 2048_u64.to_le_bytes());
    assert_eq!(read(12, 4), 254_u32.to_le_bytes());
    assert_eq!(read(20, 4), 512_u32.to_le_bytes());
    assert_eq!(read(32, 4), [1, 0, 4, 0]);
    assert_eq!(read(52, 5), [1, 0, 0, 0, 1]);
    assert_eq!(read(58, 8), [0; 8]);
    assert_eq!(read(u64::MAX, 8), [0; 8]);
    assert_eq!(rig.device.queue_sizes(), [256; 4]);
    assert!(rig.device.features() & F_MQ != 0);
}

#[test]
fn every_queue_serves_the_same_disk() {
    let mut rig = Rig::new(MIB, Way::Ring, |_, settings| settings.queues = 3);
    let header = header(T_IN, 0);
    for queue in 0..3 {
        let head = rig.driver.send(queue, &[&header], &[512, 1]);
        rig.device.process(queue).unwrap();
        let used = loop {
            match rig.driver.used(queue) {
                Some(used) => break used,
                None => rig.wait(),
            }
        };
        assert_eq!(used, Used { head, len: 513 });
    }
}

#[test]
fn a_read_only_disk_reads_and_refuses_the_rest() {
    let mut rig = Rig::new(MIB, Way::Ring, |options, _| options.read_only = true);
    let features = rig.device.features();
    assert_eq!(features & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    assert_eq!(rig.status(T_OUT, 0, &[&[1; 512]], &[]), IOERR);
    assert_eq!(rig.status(T_DISCARD, 0, &[&segment(0, 8, 0)], &[]), UNSUPP);
    assert_eq!(rig.status(T_FLUSH, 0, &[], &[]), OK);
    let (status, bytes, _) = rig.ask(T_IN, 0, &[], &[512]);
    assert_eq!((status, bytes), (OK, vec![0xaa; 512]));
}

#[test]
fn requests_off_the_disk_or_of_odd_length_are_errors_and_the_rest_goes_on() {
    let mut rig = Rig::plain(MIB);
    for (sector, len) in [
        (2048, 512),
        (2047, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 511),
        (0, 513),
    ] {
        let data = vec![1; len];
        let written = rig.ask(T_OUT, sector, &[&data], &[]);
        assert_eq!(written, (IOERR, vec![], 1), "{sector} {len}");
        let (status, _, used) = rig.ask(T_IN, sector, &[], &[len as u32]);
        assert_eq!((status, used), (IOERR, 1), "{sector} {len}");
    }
    assert_eq!(rig.status(T_IN, 0, &[], &[]), OK, "nothing, at that");
    assert_eq!(rig.status(T_IN, 2047, &[], &[512]), OK);
    assert_eq!(rig.status(99, 0, &[], &[512]), UNSUPP);
    assert!(
        std::fs::read(&rig.path)
            .unwrap()
            .iter()
            .all(|byte| *byte == 0xaa)
    );
}

#[test]
fn a_request_without_header_or_status_is_malformed() {
    let header = header(T_IN, 0);
    let cases: [(&[&[u8]], &[u32]); 4] = [
        (&[&header], &[]),
        (&[&header[..15]], &[512, 1]),
        (&[], &[512, 1]),
        (&[&header[..8], &header[8..12]], &[1]),
    ];
    for (readable, writable) in cases {
        let mut rig = Rig::plain(MIB);
        rig.driver.send(0, readable, writable);
        assert_eq!(rig.device.process(0), Err(Malformed::Request));
        // The driver's way out.
        rig.device.reset();
        let features = rig.device.features();
        rig.driver = Driver::start(&mut rig.device, features);
        assert_eq!(rig.status(T_IN, 0, &[], &[512]), OK);
    }
}

#[test]
fn a_request_in_more_pieces_than_the_queue_is_long_is_malformed() {
    let table = 24 * MIB;
    for (pieces, expected) in [(256_u64, Ok(())), (257, Err(Malformed::Request))] {
        let mut rig = Rig::plain(MIB);
        let ram = &rig.driver.ram;
        ram.write_slice(&header(T_IN, 0), GuestAddress(16 * MIB))
            .unwrap();
        for index in 0..pieces {
            // The header, pieces of two bytes, and the last one for what is missing to a sector and the status.
            let (at, len, flags) = match index {
                0 => (16 * MIB, 16_u32, 1_u16),
                _ if index + 1 < pieces => (17 * MIB + index * 2, 2, 3),
                _ => (18 * MIB, 512 - 2 * (pieces as u32 - 2) % 512 + 1, 2),
            };
            let descriptor = GuestAddress(table + index * 16);
            ram.write_obj(at, descriptor).unwrap();
            ram.write_obj(len, descriptor.unchecked_add(8)).unwrap();
            ram.write_obj(flags, descriptor.unchecked_add(12)).unwrap();
            let next = index as u16 + 1;
            ram.write_obj(next, descriptor.unchecked_add(14)).unwrap();
        }
        rig.driver.send_raw(0, &[(table, pieces as u32 * 16, 4)]);
        assert_eq!(rig.device.process(0), expected);
        if expected.is_ok() {
            assert_eq!(rig.used().len, 513);
        }
    }
}

#[test]
fn the_serial_number_is_read_as_far_as_there_is_room() {
    let mut rig = Rig::plain(MIB);
    let mut whole = b"number 1".to_vec();
    whole.resize(20, 0);
    assert_eq!(rig.ask(T_GET_ID, 0, &[], &[20]), (OK, whole.clone(), 21));
    assert_eq!(
        rig.ask(T_GET_ID, 0, &[], &[3, 2]),
        (OK, b"numbe".to_vec(), 6)
    );
    assert_eq!(rig.ask(T_GET_ID, 0, &[], &[]), (OK, vec![], 1));
}

#[test]
fn a_discard_gives_space_back_to_the_host() {
    for way in [Way::Ring, Way::Thread] {
        let mut rig = Rig::new(4 * MIB, way, |_, _| {});
        let blocks = |rig: &Rig| std::fs::metadata(&rig.path).unwrap().blocks();
        rig.file().sync_all().unwrap();
        let before = blocks(&rig);
        let status = rig.status(T_DISCARD, 0, &[&segment(2048, 4096, 0)], &[]);
        assert_eq!(status, OK);
        assert!(blocks(&rig) < before, "{way:?}: {before}, {}", blocks(&rig));
        assert_eq!(std::fs::metadata(&rig.path).unwrap().len(), 4 * MIB);
        assert_eq!(rig.ask(T_IN, 2047, &[], &[512]).1, [0xaa; 512]);
        assert_eq!(rig.ask(T_IN, 2048, &[], &[512]).1, [0; 512]);
    }
}

#[test]
fn zeroed_sectors_read_as_zeroes_and_their_neighbours_do_not() {
    for way in [Way::Ring, Way::Thread] {
        for flags in [0, 1] {
            let mut rig = Rig::new(MIB, way, |_, _| {});
            let zeroes = segment(3, 100, flags);
            assert_eq!(rig.status(T_WRITE_ZEROES, 0, &[&zeroes], &[]), OK);
            let (_, bytes, _) = rig.ask(T_IN, 0, &[], &[512 * 200]);
            for (sector, bytes) in bytes.chunks(512).enumerate() {
                let expected = if (3..103).contains(&sector) { 0 } else { 0xaa };
                assert!(bytes.iter().all(|byte| *byte == expected), "{sector}");
            }
        }
    }
}

#[test]
fn segments_that_are_not_allowed_change_nothing() {
    let mut rig = Rig::plain(MIB);
    let two = [segment(0, 1, 0), segment(1, 1, 0)].concat();
    for (kind, data, expected) in [
        (T_DISCARD, &segment(0, 1, 1)[..], UNSUPP),
        (T_DISCARD, &segment(0, 1, 2)[..], UNSUPP),
        (T_WRITE_ZEROES, &segment(0, 1, 2)[..], UNSUPP),
        (T_WRITE_ZEROES, &segment(2047, 2, 0)[..], IOERR),
        (T_WRITE_ZEROES, &segment(u64::MAX, u32::MAX, 0)[..], IOERR),
        (T_DISCARD, &segment(0, u32::MAX, 0)[..], IOERR),
        (T_DISCARD, &two[..], IOERR),
        (T_DISCARD, &two[..15], IOERR),
        (T_WRITE_ZEROES, &[][..], IOERR),
        (T_WRITE_ZEROES, &segment(5, 0, 0)[..], OK),
    ] {
        assert_eq!(
            rig.status(kind, 0, &[data], &[]),
            expected,
            "{kind} {data:?}"
        );
    }
    assert!(
        std::fs::read(&rig.path)
            .unwrap()
            .iter()
            .all(|byte| *byte == 0xaa)
    );
}

#[test]
fn a_file_that_became_shorter_gives_an_error_and_not_stale_memory() {
    for way in [Way::Ring, Way::Thread] {
        let mut rig = Rig::new(MIB, way, |_, _| {});
        rig.file().set_len(4096 + 100).unwrap();
        assert_eq!(rig.status(T_IN, 7, &[], &[512]), OK);
        assert_eq!(rig.status(T_IN, 8, &[], &[512]), IOERR, "cut in two");
        assert_eq!(rig.status(T_IN, 2047, &[], &[512]), IOERR);
        assert_eq!(rig.device.warned.len(), 1, "one line for all of them");
        assert_eq!(rig.status(T_IN, 0, &[], &[512]), OK);
    }
}

#[test]
fn without_a_cache_each_write_is_flushed_before_it_is_answered() {
    for way in [Way::Ring, Way::Thread] {
        let mut rig = Rig::new(MIB, way, |_, _| {});
        rig.device.write_config(CONFIG_WRITEBACK, &[0]);
        let head = rig.send(T_OUT, 0, &[&[1; 512]], &[]);
        rig.device.process(0).unwrap();
        rig.wait();
        assert_eq!(rig.driver.used(0), None, "written, not flushed");
        assert_eq!(rig.used(), Used { head, len: 1 });
        rig.device.write_config(CONFIG_WRITEBACK, &[1]);
        rig.send(T_OUT, 0, &[&[1; 512]], &[]);
        rig.device.process(0).unwrap();
        rig.wait();
        assert!(rig.driver.used(0).is_some());
    }
}

#[test]
fn a_driver_that_cannot_flush_gets_no_cache() {
    let mut rig = Rig::plain(MIB);
    let offered = rig.device.features();
    let writeback = |device: &Block| {
        let mut byte = [0];
        device.read_config(CONFIG_WRITEBACK, &mut byte);
        byte == [1]
    };
    for (features, set, expected) in [
        (offered, None, true),
        (offered, Some(0), false),
        (offered & !F_CONFIG_WCE, Some(0), true),
        (offered & !F_FLUSH, None, false),
        (offered & !F_FLUSH, Some(1), false),
        (offered & !(F_FLUSH | F_CONFIG_WCE), None, false),
    ] {
        rig.device.reset();
        assert!(writeback(&rig.device));
        Driver::start(&mut rig.device, features);
        if let Some(value) = set {
            rig.device.write_config(CONFIG_WRITEBACK, &[value]);
        }
        assert_eq!(writeback(&rig.device), expected, "{features:#x} {set:?}");
    }
}

#[test]
fn many_requests_at_once_all_come_back() {
    for features in [0, F_EVENT_IDX] {
        for way in [Way::Ring, Way::Thread] {
            let mut rig = Rig::new(MIB, way, |_, _| {});
            rig.device.reset();
            let features = rig.device.features() | features;
            rig.driver = Driver::start(&mut rig.device, features);
            for round in 0..20_u64 {
                let data = vec![round as u8; 512];
                for n in 0..16 {
                    rig.send(T_OUT, round * 16 + n, &[&data], &[]);
                }
                rig.device.process(0).unwrap();
                for _ in 0..16 {
                    assert_eq!(rig.used().len, 1);
                }
            }
            for round in 0..20_u64 {
                let (_, bytes, _) = rig.ask(T_IN, round * 16, &[], &[512 * 16]);
                assert!(bytes.iter().all(|byte| *byte == round as u8));
            }
        }
    }
}

#[test]
fn after_a_reset_nothing_of_before_touches_memory_or_comes_back() {
    for way in [Way::Ring, Way::Thread] {
        let mut rig = Rig::new(4 * MIB, way, |_, _| {});
        for _ in 0..8 {
            rig.send(T_IN, 0, &[], &[1 << 20]);
        }
        rig.device.process(0).unwrap();
        rig.device.reset();
        assert_eq!(rig.device.interests(), [Interest::NONE]);
        assert_eq!(rig.driver.used(0), None);
        let features = rig.device.features();
        rig.driver = Driver::start(&mut rig.device, features);
        let (status, bytes, _) = rig.ask(T_IN, 1, &[], &[512]);
        assert_eq!((status, bytes), (OK, vec![0xaa; 512]));
    }
}

#[test]
fn a_limited_disk_makes_requests_wait_for_the_timer() {
    let mut rig = Rig::new(MIB, Way::Ring, |_, settings| {
        settings.limits.operations = std::num::NonZeroU64::new(20);
    });
    assert_eq!(rig.device.sources().len(), 2);
    let start = Instant::now();
    for _ in 0..22 {
        rig.send(T_IN, 0, &[], &[512]);
        rig.device.process(0).unwrap();
    }
    for _ in 0..22 {
        assert_eq!(rig.used().len, 513);
    }
    // 20 at once, and two more at 20 a second.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(100), "{took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
}

#[test]
fn a_request_handed_over_again_and_again_is_under_way_a_bounded_number_of_times() {
    let mut rig = Rig::new(MIB, Way::Thread, |_, _| {});
    let head = rig.send(T_IN, 0, &[], &[512]);
    // The available ring says the same head 40 times as often as the queue has places.
    for index in (1..2560_u16).chain(2560..2561) {
        rig.driver
            .ram
            .write_obj(head, GuestAddress(0x1000 + 4 + u64::from(index % 64) * 2))
            .unwrap();
        rig.driver
            .ram
            .write_obj(index, GuestAddress(0x1000 + 2))
            .unwrap();
        rig.device.process(0).unwrap();
        if rig.device.active.as_ref().unwrap().pending.len() >= 64 {
            break;
        }
    }
    assert!(rig.device.active.as_ref().unwrap().pending.len() <= 64);
    rig.device.reset();
}

#[test]
fn random_requests_never_harm_the_device() {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for way in [Way::Ring, Way::Thread] {
        let mut rig = Rig::new(MIB, way, |_, _| {});
        let features = rig.device.features() | TRANSPORT_FEATURES;
        let mut answered = 0;
        for _ in 0..100 {
            for _ in 0..8 {
                let kind = [0, 1, 4, 8, 11, 13, next() as u32][next() as usize % 7];
                let sector = [next() % 2200, next(), u64::MAX / 512][next() as usize % 3];
                let header = header(kind, sector);
                let len = [0, 1, 15, 16, 512, 513, 4096][next() as usize % 7];
                let mut body: Vec<u8> = (0..len).map(|_| next() as u8).collect();
                if len == 16 && next() % 2 == 0 {
                    let sectors = next() as u32 % 300;
                    body = segment(next() % 2048, sectors, next() as u32 % 3).to_vec();
                }
                let header_len = if next() % 40 == 0 {
                    next() as usize % 16
                } else {
                    16
                };
                let mut writable: Vec<u32> =
                    (0..next() % 3).map(|_| next() as u32 % 2000).collect();
                if next() % 40 != 0 {
                    writable.push(1);
                }
                let pieces = [&header[..header_len], &body[..]];
                if next() % 50 == 0 {
                    rig.driver
                        .send_raw(0, &[(next(), next() as u32, next() as u16)]);
                } else {
                    rig.driver.send(0, &pieces, &writable);
                }
            }
            let mut fine = rig.device.process(0).is_ok();
            while fine && !rig.device.active.as_ref().unwrap().pending.is_empty() {
                fine = wait(&mut rig.device).is_ok();
            }
            while rig.driver.used(0).is_some() {
                answered += 1;
            }
            rig.device
                .write_config(next() % 64, &next().to_le_bytes()[..1]);
            rig.device.reset();
            rig.driver = Driver::start(&mut rig.device, features);
        }
        assert!(answered > 100, "{answered}");
        assert_eq!(std::fs::metadata(&rig.path).unwrap().len(), MIB);
        assert_eq!(rig.status(T_OUT, 0, &[&[7; 512]], &[]), OK);
    }
}

#[test]
fn the_cache_mode_survives_a_save_and_a_restore() {
    let mut rig = Rig::plain(MIB);
    rig.device.write_config(CONFIG_WRITEBACK, &[0]);
    let saved = rig.device.save();
    let mut other = Rig::plain(MIB);
    other.device.restore(&saved).unwrap();
    assert!(!other.device.state.writeback);
    assert!(other.device.restore(&SavedState::of(&())).is_err());
}

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
