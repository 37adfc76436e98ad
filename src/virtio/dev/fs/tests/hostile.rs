//! Messages that no guest's kernel sends.

use super::*;

#[test]
fn a_message_without_header_or_place_for_its_answer_is_malformed() {
    let rig = Rig::new();
    let whole = rig.message(GETATTR, ROOT, &[&[0; 16]]);
    let long = vec![0; MESSAGE_MAX as usize + 1];
    let cases: [(&[&[u8]], &[u32]); 6] = [
        (&[], &[4096]),
        (&[&whole[..39]], &[4096]),
        (&[&whole[..20], &whole[20..30]], &[4096]),
        (&[&whole], &[]),
        (&[&whole], &[15]),
        (&[&long], &[4096]),
    ];
    for queue in [HIPRIO, REQUESTS] {
        for (readable, writable) in cases {
            let mut rig = Rig::new();
            rig.driver.send(queue, readable, writable);
            assert_eq!(rig.device.process(queue), Err(Malformed::Request));
            // The driver's way out.
            rig.device.reset();
            rig.driver = Driver::start(&mut rig.device, TRANSPORT_FEATURES);
            rig.mount();
            rig.getattr(ROOT).unwrap();
        }
    }
    let mut rig = Rig::new();
    rig.driver.send_raw(REQUESTS, &[(u64::MAX - 8, 64, 0)]);
    assert_eq!(rig.device.process(REQUESTS), Err(Malformed::Address));
}

#[test]
fn a_length_that_lies_is_an_error_of_that_message_alone() {
    let mut rig = Rig::new();
    let whole = rig.message(GETATTR, ROOT, &[&[0; 16]]);
    for len in [0_u32, 39, 57, u32::MAX] {
        let mut message = whole.clone();
        message[..4].copy_from_slice(&len.to_le_bytes());
        let answer = rig.ask_raw(&message, ROOM);
        assert_eq!(answer, bytes!(16_u32, -libc::EINVAL, 77_u64), "{len}");
    }
    // What follows the message is not part of it.
    let padded = [&whole[..], &[0xff; 100]].concat();
    assert_eq!(rig.ask_raw(&padded, ROOM).len(), 16 + 104);
    // A name that ends only behind the end.
    let mut message = rig.message(LOOKUP, ROOT, &[b"abc"]);
    message.extend(b"\0");
    let answer = rig.ask_raw(&message, ROOM);
    assert_eq!(answer, bytes!(16_u32, -libc::EINVAL, 77_u64));
    // Without an answer, a broken one is handed back and that is all.
    let mut message = rig.message(FORGET, ROOT, &[&[0; 8]]);
    message[..4].copy_from_slice(&9_u32.to_le_bytes());
    rig.driver.send(HIPRIO, &[&message], &[]);
    rig.device.process(HIPRIO).unwrap();
    assert_eq!(rig.used(HIPRIO).len, 0);
}

#[test]
fn a_message_that_is_cut_short_is_refused_whatever_it_asks_for() {
    let mut rig = Rig::new();
    rig.write_file("a", b"x");
    let (node, _) = rig.lookup(ROOT, "a").unwrap();
    for opcode in 0..60 {
        if matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT) {
            continue;
        }
        for len in [0, 1, 7] {
            let answer = rig.ask(opcode, node, &[&vec![0; len]]);
            if !matches!(opcode, READLINK | STATFS | DESTROY | OPENDIR) {
                assert!(answer.is_err(), "{opcode} {len}");
            }
            rig.mount();
            rig.lookup(ROOT, "a").unwrap();
        }
    }
    // Sizes that are not there.
    let (node, handle) = rig.create(ROOT, "b", RDWR, 0o600).unwrap();
    let body = bytes!(handle, 0_u64, u32::MAX, 0_u32, 0_u64, 0_u32, 0_u32);
    assert_eq!(rig.ask(WRITE, node, &[&body, b"abc"]), Err(libc::EINVAL));
    assert_eq!(rig.ask(READ, node, &[&body]).unwrap(), b"");
    let body = [bytes!(u32::MAX, 0_u32), name("user.k")].concat();
    assert_eq!(rig.ask(SETXATTR, node, &[&body, b"v"]), Err(libc::EINVAL));
    assert_eq!(rig.getattr(node).unwrap().size, 0);
}

#[test]
fn an_answer_never_leaves_the_room_that_it_has() {
    let mut rig = Rig::new();
    rig.write_file("a", b"0123456789");
    let (node, _) = rig.lookup(ROOT, "a").unwrap();
    let handle = rig.open(node, RDWR).unwrap();
    let left = rig.budget.left();
    let read = bytes!(handle, 0_u64, 1000_u32, 0_u32, 0_u64, 0_u32, 0_u32);
    let requests: [(u32, u64, Vec<u8>); 7] = [
        (LOOKUP, ROOT, name("a")),
        (OPEN, node, bytes!(RDONLY, 0_u32)),
        (OPENDIR, ROOT, vec![0; 8]),
        (
            CREATE,
            ROOT,
            [bytes!(RDWR, 0o600_u32, 0_u64), name("b")].concat(),
        ),
        (MKDIR, ROOT, [vec![0; 8], name("c")].concat()),
        (GETATTR, node, vec![0; 16]),
        (STATFS, node, vec![]),
    ];
    for (opcode, node, body) in requests {
        for room in [16, 17, 31] {
            let answer = rig.ask_with_room(opcode, node, &[&body], room);
            assert_eq!(answer, Err(libc::EINVAL), "{opcode}");
        }
    }
    assert_eq!(rig.budget.left(), left, "nothing was opened in vain");
    assert!(!rig.at("b").exists() && !rig.at("c").exists());
    let answer = rig.ask_with_room(READ, node, &[&read], 16 + 4);
    assert_eq!(answer.unwrap(), b"0123");
    assert_eq!(rig.ask_with_room(READ, node, &[&read], 16).unwrap(), b"");
    // In pieces of any size.
    let message = rig.message(READ, node, &[&read]);
    let pieces = [&message[..3], &message[3..50], &message[50..]];
    let head = rig.driver.send(REQUESTS, &pieces, &[1, 20, 100]);
    rig.device.process(REQUESTS).unwrap();
    assert_eq!(rig.used(REQUESTS).len, 26);
    assert_eq!(&rig.driver.written(REQUESTS, head)[16..26], b"0123456789");
}

#[test]
fn handles_are_good_only_for_their_own_node_and_kind() {
    let mut rig = Rig::new();
    let (a, handle) = rig.create(ROOT, "a", RDWR, 0o600).unwrap();
    let (b, _) = rig.create(ROOT, "b", RDWR, 0o600).unwrap();
    let directory = u64_at(&rig.ask(OPENDIR, ROOT, &[&[0; 8]]).unwrap(), 0);
    let body = bytes!(handle, 0_u64, 99_u32, 0_u32, 0_u64, 0_u32, 0_u32);
    for (opcode, node) in [(READ, b), (READ, ROOT), (READDIR, a), (READDIRPLUS, ROOT)] {
        assert_eq!(rig.ask(opcode, node, &[&body]), Err(libc::EBADF));
    }
    assert_eq!(rig.read(ROOT, directory, 0, 10), Err(libc::EBADF));
    assert_eq!(rig.open(ROOT, RDONLY), Err(libc::EISDIR));
    let release = bytes!(handle, 0_u32, 0_u32, 0_u64);
    for (opcode, node) in [(RELEASEDIR, a), (RELEASE, b)] {
        assert_eq!(rig.ask(opcode, node, &[&release]), Err(libc::EBADF));
    }
    rig.ask(RELEASE, a, &[&release]).unwrap();
}

#[test]
fn a_storm_of_lookups_and_forgets_leaves_nothing_behind() {
    let mut rig = Rig::new();
    for text in ["a", "b", "c"] {
        rig.write_file(text, b"");
    }
    for round in 0..400_u64 {
        let (node, _) = rig
            .lookup(ROOT, ["a", "b", "c"][round as usize % 3])
            .unwrap();
        // Sometimes more than there is, sometimes somebody else's.
        rig.tell(FORGET, node, &[&(1 + round % 3).to_le_bytes()]);
        rig.tell(FORGET, node ^ round, &[&u64::MAX.to_le_bytes()]);
    }
    assert_eq!(rig.budget.left(), 1000);
    rig.getattr(ROOT).unwrap();
}

#[test]
fn any_bytes_are_answered_or_refused_and_change_nothing_outside() {
    let mut rig = Rig::new();
    let outside = rig.path.with_file_name("outside");
    fs::write(&outside, "untouched").unwrap();
    // A linear congruential generator (Knuth's MMIX constants), so that a failure can be had again.
    let mut state = 1_u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    for round in 0..4000_u64 {
        if round % 50 == 0 {
            rig.mount();
            // Guest memory starts anew.
            rig.device.reset();
            rig.driver = Driver::start(&mut rig.device, TRANSPORT_FEATURES);
            rig.mount();
            rig.write_file("a", b"content");
            let _ = fs::create_dir(rig.at("d"));
            let _ = rig.lookup(ROOT, "a");
            let _ = rig.lookup(ROOT, "d");
            let _ = rig.ask(OPENDIR, ROOT, &[&[0; 8]]);
        }
        let len = random() as usize % 160;
        let mut body: Vec<u8> = (0..len)
            .map(|_| match random() % 4 {
                0 => random() as u8,
                1 => b"ad./\0.."[random() as usize % 7],
                2 => random() as u8 % 8,
                _ => 0,
            })
            .collect();
        if random() % 2 == 0 {
            body.extend(b"a\0");
        }
        let opcode = random() as u32 % 56;
        let message = rig.message(opcode, random() % 6, &[&body]);
        if is_answered(opcode) {
            let room = 16 + random() as u32 % 600;
            let answer = rig.ask_raw(&message, room);
            assert!(answer.len() >= 16 && answer.len() <= room as usize);
        } else {
            rig.tell(opcode, random() % 6, &[&body]);
        }
    }
    assert_eq!(fs::read(&outside).unwrap(), b"untouched");
    let above: Vec<_> = fs::read_dir(rig.path.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(above.len(), 2);
}

#[test]
fn a_saved_device_has_no_state_and_says_so() {
    let mut rig = Rig::new();
    let state = rig.device.save();
    rig.device.reset();
    rig.device.restore(&state).unwrap();
    rig.driver = Driver::start(&mut rig.device, TRANSPORT_FEATURES);
    assert_eq!(rig.getattr(ROOT).unwrap_err(), libc::ENOTCONN);
}
