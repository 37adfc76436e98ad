//! What a guest may get wrong, by mistake or on purpose.

use super::*;
use crate::mem::{Bytes, GuestAddress};

#[test]
fn each_lie_has_its_answer_and_touches_no_other_connection() {
    let reply = Some((52, GUEST));
    for (what, header, expected) in [
        (
            "a wrong CID of its own",
            Header {
                src_cid: 8,
                ..packet(OP_REQUEST, 52)
            },
            None,
        ),
        (
            "a CID of many bits",
            Header {
                src_cid: 1 << 32 | 7,
                ..packet(OP_REQUEST, 52)
            },
            None,
        ),
        (
            "another machine",
            Header {
                dst_cid: 9,
                ..packet(OP_REQUEST, 52)
            },
            reply,
        ),
        (
            "its own machine",
            Header {
                dst_cid: 7,
                ..packet(OP_REQUEST, 52)
            },
            reply,
        ),
        (
            "SEQPACKET",
            Header {
                kind: 2,
                ..packet(OP_REQUEST, 52)
            },
            reply,
        ),
        (
            "no type",
            Header {
                kind: 0,
                ..packet(OP_RW, 52)
            },
            reply,
        ),
        ("no operation", packet(0, 52), reply),
        ("an unknown operation", packet(77, 52), reply),
        ("data for nobody", data(52, 0), reply),
        ("an answer to nobody", packet(OP_RESPONSE, 52), reply),
        ("an end of nothing", shutdown(52, 3), reply),
        ("credit for nobody", packet(OP_CREDIT_UPDATE, 52), reply),
        (
            "a request for nobody's credit",
            packet(OP_CREDIT_REQUEST, 52),
            reply,
        ),
        ("RST for nobody", packet(OP_RST, 52), None),
        (
            "RST of another type",
            Header {
                kind: 9,
                ..packet(OP_RST, 52)
            },
            None,
        ),
        (
            "RST for another machine",
            Header {
                dst_cid: 9,
                ..packet(OP_RST, 52)
            },
            None,
        ),
    ] {
        let mut guest = Guest::new();
        let mut bystander = guest.connected(51);
        guest.queue(header, b"");
        // The answer comes from where the packet went to, whatever that is.
        let mut answers = Vec::new();
        guest.device.process(TX).unwrap();
        guest.driver.send(RX, &[], &[HEADER_LEN]);
        guest.device.process(RX).unwrap();
        while let Some(used) = guest.driver.used(RX) {
            let bytes = guest.driver.written(RX, used.head);
            let got = Header::parse(bytes[..44].try_into().unwrap());
            assert_eq!((got.op, got.src_cid), (OP_RST, header.dst_cid), "{what}");
            assert_eq!(
                (got.dst_cid, got.kind),
                (header.src_cid, header.kind),
                "{what}"
            );
            answers.push((got.src_port, got.dst_port));
            guest.posted = guest.posted.saturating_sub(1);
        }
        assert_eq!(answers.first().copied(), expected, "{what}");
        assert!(answers.len() <= 1, "{what}");
        assert_eq!(guest.device.connections.len(), 1, "{what}");
        bystander.write_all(b"still there").unwrap();
        guest.pump();
        assert_eq!(guest.expect(OP_RW, 51, GUEST).1, b"still there", "{what}");
    }
}

#[test]
fn what_makes_no_sense_on_a_connection_ends_it() {
    for (what, header) in [
        ("a second request", packet(OP_REQUEST, 52)),
        ("a second answer", packet(OP_RESPONSE, 52)),
        ("no operation", packet(0, 52)),
        ("an unknown operation", packet(u16::MAX, 52)),
    ] {
        let mut guest = Guest::new();
        let mut program = guest.connected(52);
        guest.send(header, b"");
        guest.expect(OP_RST, 52, GUEST);
        guest.expect_nothing();
        assert!(is_closed(&mut program), "{what}");
        assert_eq!(guest.device.connections.len(), 0, "{what}");
    }
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    guest.send(shutdown(52, SHUTDOWN_SEND), b"");
    guest.send(data(52, 4), b"more");
    guest.expect(OP_RST, 52, GUEST);
    assert!(is_closed(&mut program));
}

#[test]
fn a_packet_of_another_type_does_not_touch_the_connection_of_the_same_ports() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    let seqpacket = Header {
        kind: 2,
        ..data(52, 4)
    };
    guest.send(seqpacket, b"lost");
    assert_eq!(guest.expect(OP_RST, 52, GUEST).0.kind, 2);
    guest.send(data(52, 5), b"still");
    assert_eq!(available(&mut program), b"still");
}

#[test]
fn packets_that_are_shorter_than_they_say_are_malformed_and_longer_ones_are_cut_off() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    guest.send(data(52, 4), b"data and noise");
    assert_eq!(available(&mut program), b"data");
    // Only RW has data, whatever the others say.
    let update = Header {
        len: u32::MAX,
        ..packet(OP_CREDIT_UPDATE, 52)
    };
    guest.send(update, b"");
    guest.expect_nothing();
    let short: [&[&[u8]]; 4] = [
        &[&[0; 43]],
        &[],
        &[&data(52, 5).bytes(), b"four"],
        &[&data(52, u32::MAX as usize).bytes(), b"four"],
    ];
    for pieces in short {
        guest.driver.send(TX, pieces, &[16]);
        assert_eq!(guest.device.process(TX), Err(Malformed::Request));
        guest.restart();
    }
    // A header may come in pieces.
    std::fs::remove_file(guest.port(52)).unwrap();
    let _listener = guest.listen(52);
    let bytes = packet(OP_REQUEST, 52).bytes();
    guest
        .driver
        .send(TX, &[&bytes[..1], &bytes[1..30], &bytes[30..]], &[]);
    guest.pump();
    guest.expect(OP_RESPONSE, 52, GUEST);
}

#[test]
fn buffers_without_room_are_malformed() {
    for (room, header_fits) in [(&[43][..], false), (&[][..], false), (&[44][..], true)] {
        let mut guest = Guest::new();
        guest.posts = false;
        guest.queue(packet(OP_REQUEST, 52), b"");
        guest.driver.send(RX, &[b"readable"], room);
        let expected = match header_fits {
            true => Ok(()),
            false => Err(Malformed::Request),
        };
        assert_eq!(guest.device.process(TX), expected, "{room:?}");
    }
    // A header fits, but no data.
    let mut guest = Guest::with_room(0);
    let mut program = guest.connected(52);
    program.write_all(b"data").unwrap();
    assert_eq!(
        guest.device.ready(0, Interest::READ),
        Err(Malformed::Request)
    );
}

#[test]
fn a_storm_of_packets_for_nobody_waits_for_the_guest_to_take_the_answers() {
    let mut guest = Guest::new();
    guest.posts = false;
    for _ in 0..100 {
        for _ in 0..10 {
            guest.queue(packet(OP_CREDIT_REQUEST, 9), b"");
        }
        guest.device.process(TX).unwrap();
        assert!(guest.device.connections.waiting() <= 256);
        if !guest.device.connections.has_room() {
            break;
        }
        while guest.driver.used(TX).is_some() {}
    }
    assert!(!guest.device.connections.has_room());
    // No more are taken.
    while guest.driver.used(TX).is_some() {}
    guest.queue(packet(OP_CREDIT_REQUEST, 9), b"");
    guest.device.process(TX).unwrap();
    assert_eq!(guest.driver.used(TX), None);
    // And all are answered in the end.
    guest.posts = true;
    guest.pump();
    assert!(guest.arrived.len() > 256);
    assert!(
        guest
            .arrived
            .drain(..)
            .all(|(header, _)| header.op == OP_RST)
    );
    guest.connected(52);
}

#[test]
fn connections_that_come_and_go_while_the_guest_takes_nothing_leave_nothing_behind() {
    let mut guest = Guest::new();
    let listener = guest.listen(52);
    guest.posts = false;
    for _ in 0..500 {
        guest.send(packet(OP_REQUEST, 52), b"");
        guest.send(packet(OP_RST, 52), b"");
        drop(listener.accept().unwrap());
        let _ = guest.program("CONNECT 5\n");
        guest.pump();
        assert!(guest.device.connections.waiting() <= 1);
    }
    assert_eq!(guest.device.connections.len(), 0);
}

#[test]
fn no_sequence_of_packets_brings_the_device_down() {
    let mut seed = 0x5eed_0f5a_7a96_0001_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for round in 0..100 {
        let mut guest = Guest::with_room(random(300) as u32 + 1);
        guest.device.connections.limit = 8;
        let listeners: Vec<UnixListener> = (0..3).map(|port| guest.listen(port)).collect();
        let mut programs: Vec<UnixStream> = Vec::new();
        for _ in 0..150 {
            let len = random(200);
            let ports = [0, 1, 2, 3, 1 << 30, (1 << 30) + 1];
            let header = Header {
                src_cid: if random(30) == 0 {
                    random(10)
                } else {
                    CID.into()
                },
                dst_cid: if random(30) == 0 { random(10) } else { 2 },
                src_port: random(3) as u32,
                dst_port: ports[random(6) as usize],
                len: if random(300) == 0 {
                    u32::MAX
                } else {
                    len as u32
                },
                kind: if random(30) == 0 { random(4) as u16 } else { 1 },
                op: random(9) as u16,
                flags: random(5) as u32,
                buf_alloc: if random(3) == 0 {
                    random(1 << 32) as u32
                } else {
                    1000
                },
                fwd_cnt: if random(3) == 0 {
                    random(1 << 32) as u32
                } else {
                    0
                },
            };
            if random(60) == 0 {
                let address = if random(2) == 0 {
                    u64::MAX - 50
                } else {
                    0x10_0000
                };
                guest
                    .driver
                    .ram
                    .write_slice(&header.bytes(), GuestAddress(0x10_0000))
                    .unwrap();
                let pieces = [(address, random(1 << 33) as u32, random(8) as u16); 2];
                guest
                    .driver
                    .send_raw(random(3) as usize, &pieces[..1 + random(2) as usize]);
            } else {
                guest.queue(header, &vec![round; len as usize]);
            }
            match random(6) {
                0 => programs.push(guest.program(&format!("CONNECT {}\n", random(3)))),
                1 if !programs.is_empty() => {
                    let index = random(programs.len() as u64) as usize;
                    let _ = programs[index].write(&[round; 500]);
                }
                2 if !programs.is_empty() => {
                    programs.swap_remove(random(programs.len() as u64) as usize);
                }
                3 => {
                    let accepted = listeners.iter().filter_map(|l| l.accept().ok());
                    programs.extend(accepted.map(|(program, _)| program));
                }
                _ => {}
            }
            for program in &mut programs {
                program.set_nonblocking(true).unwrap();
                if random(2) == 0 {
                    let _ = program.read(&mut [0; 4000]);
                }
            }
            if guest.posted < 10 && random(3) > 0 {
                guest.driver.send(RX, &[], &[HEADER_LEN + guest.room]);
                guest.posted += 1;
            }
            let outcome = match random(3) {
                0 => guest.device.ready(0, Interest::READ),
                _ => guest.device.process(random(4) as usize),
            };
            let connections = &guest.device.connections;
            assert!(connections.len() <= 8 && connections.waiting() <= 256 + 8);
            if outcome.is_err() || random(50) == 0 {
                guest.restart();
            }
            while guest.driver.used(RX).is_some() {
                guest.posted = guest.posted.saturating_sub(1);
            }
            while guest.driver.used(TX).is_some() {}
        }
    }
}
