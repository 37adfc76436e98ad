//! A driver's day with a disk, reached through io_uring and through a thread.

mod hostile;
mod images;
mod turns;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use tempfile::TempDir;

use super::*;
use crate::backend::disk::{Format, Options};
use crate::virtio::driver::{Driver, Used};
use crate::virtio::{F_EVENT_IDX, TRANSPORT_FEATURES};

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
    /// Through a ring, but the image lies in a tmpfs, where nothing need be waited for.
    Memory,
}

const WAYS: [Way; 3] = [Way::Ring, Way::Thread, Way::Memory];

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
        own_worker: false,
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
        let scratch = match way {
            Way::Ring | Way::Thread => tempfile::tempdir().unwrap(),
            Way::Memory => tempfile::tempdir_in("/dev/shm").unwrap(),
        };
        let path = scratch.path().join("disk.img");
        std::fs::write(&path, vec![0xaa; len as usize]).unwrap();
        let (mut options, mut settings) = (options(&path), settings());
        change(&mut options, &mut settings);
        let disk = match way {
            Way::Ring | Way::Memory => Disk::open(&options).unwrap(),
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
    for way in WAYS {
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
    for way in WAYS {
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
    for way in WAYS {
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
        for way in WAYS {
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
fn the_cache_mode_survives_a_save_and_a_restore() {
    let mut rig = Rig::plain(MIB);
    rig.device.write_config(CONFIG_WRITEBACK, &[0]);
    let saved = rig.device.save();
    let mut other = Rig::plain(MIB);
    other.device.restore(&saved).unwrap();
    assert!(!other.device.state.writeback);
    assert!(other.device.restore(&SavedState::of(&())).is_err());
}
