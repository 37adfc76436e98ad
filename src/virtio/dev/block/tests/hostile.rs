//! Requests that a driver should not make, and files that change under the device.

use vm_memory::Address;

use super::*;

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
    for (pieces, expected) in [(256_u64, Ok(())), (257, Err(Malformed::Chain))] {
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
    for way in WAYS {
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
fn after_a_reset_nothing_of_before_touches_memory_or_comes_back() {
    for way in WAYS {
        let mut rig = Rig::new(4 * MIB, way, |_, _| {});
        for _ in 0..8 {
            rig.send(T_IN, 0, &[], &[1 << 20]);
        }
        rig.device.process(0).unwrap();
        while rig.driver.used(0).is_some() {}
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
fn a_driver_that_never_stops_asking_does_not_keep_the_device_from_coming_back() {
    const AVAIL_INDEX: GuestAddress = GuestAddress(0x1002);
    const USED_INDEX: GuestAddress = GuestAddress(0x2002);
    let mut rig = Rig::plain(MIB);
    // A request that is answered at once, and a ring of zeroes, which names it in all its places.
    assert_eq!(rig.send(T_GET_ID, 0, &[], &[20]), 0);
    let ram = rig.driver.ram.clone();
    let calls = std::thread::scope(|scope| {
        // Another processor of the guest, which is a few requests ahead until it has seen enough of them answered.
        let other = scope.spawn(move || {
            let (mut seen, mut total) = (0_u16, 0_u32);
            while total < 50_000 {
                let used: u16 = ram.read_obj(USED_INDEX).unwrap();
                total += u32::from(used.wrapping_sub(seen));
                seen = used;
                ram.write_obj(used.wrapping_add(32), AVAIL_INDEX).unwrap();
            }
        });
        let mut calls = Vec::new();
        while !other.is_finished() {
            let before: u16 = rig.driver.ram.read_obj(USED_INDEX).unwrap();
            rig.device.process(0).unwrap();
            let after: u16 = rig.driver.ram.read_obj(USED_INDEX).unwrap();
            calls.push(after.wrapping_sub(before));
        }
        calls
    });
    assert!(calls.iter().all(|answered| *answered <= 64), "{calls:?}");
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
    for way in WAYS {
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
