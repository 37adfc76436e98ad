//! Data and credit.

use super::*;

/// The packets of a guest that sends `bytes` as its credit allows, as far as it goes now.
struct Sender {
    port: u32,
    bytes: Vec<u8>,
    sent: usize,
    forwarded: u32,
}

impl Sender {
    fn new(port: u32, bytes: Vec<u8>) -> Sender {
        Sender {
            port,
            bytes,
            sent: 0,
            forwarded: 0,
        }
    }

    fn go_on(&mut self, guest: &mut Guest) {
        loop {
            for (header, _) in guest.arrived.drain(..) {
                assert_eq!(header.op, OP_CREDIT_UPDATE);
                self.forwarded = header.fwd_cnt;
            }
            let under_way = self.sent - self.forwarded as usize;
            let credit = BUF_ALLOC as usize - under_way;
            let len = credit.min(16 << 10).min(self.bytes.len() - self.sent);
            if len == 0 {
                return;
            }
            let piece = self.bytes[self.sent..][..len].to_vec();
            guest.send(data(self.port, len), &piece);
            self.sent += len;
        }
    }
}

#[test]
fn a_guest_sends_no_more_than_its_credit_to_a_program_that_does_not_read() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    let mut sender = Sender::new(52, pattern(1 << 20));
    sender.go_on(&mut guest);
    let stuck = sender.sent;
    assert!(stuck < 1 << 20);
    assert_eq!(sender.sent - sender.forwarded as usize, BUF_ALLOC as usize);
    guest.expect_nothing();
    // It asks, and is told the same.
    guest.send(packet(OP_CREDIT_REQUEST, 52), b"");
    assert!(
        guest
            .arrived
            .iter()
            .any(|(header, _)| header.op == OP_CREDIT_UPDATE)
    );
    sender.go_on(&mut guest);
    assert!(sender.sent - stuck < BUF_ALLOC as usize);
    let mut got = Vec::new();
    while got.len() < 1 << 20 {
        got.extend(available(&mut program));
        guest.pump();
        sender.go_on(&mut guest);
    }
    assert!(got == sender.bytes);
    assert_eq!(sender.sent, 1 << 20);
}

#[test]
fn a_guest_that_sends_more_than_its_credit_loses_the_connection_and_nothing_else() {
    let mut guest = Guest::new();
    let mut other = guest.connected(51);
    let mut program = guest.connected(52);
    let mut sender = Sender::new(52, pattern(1 << 20));
    sender.go_on(&mut guest);
    guest.send(data(52, 1), b"!");
    guest.expect(OP_RST, 52, GUEST);
    guest.send(data(52, 1), b"!");
    guest.expect(OP_RST, 52, GUEST);
    let mut got = Vec::new();
    while let bytes @ [_, ..] = &available(&mut program)[..] {
        got.extend_from_slice(bytes);
    }
    assert!(sender.bytes.starts_with(&got));
    assert!(is_closed(&mut program));
    guest.send(data(51, 5), b"still");
    assert_eq!(available(&mut other), b"still");
}

#[test]
fn a_program_sends_no_more_than_the_credit_of_a_guest_that_does_not_read() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    let bytes = pattern(1 << 20);
    let (mut written, mut got, mut asked) = (0, Vec::new(), 0);
    while got.len() < bytes.len() {
        written += program.write(&bytes[written..]).unwrap_or(0);
        guest.pump();
        let mut under_way = 0;
        for (header, data) in guest.arrived.drain(..) {
            match header.op {
                OP_RW => under_way += data.len(),
                OP_CREDIT_REQUEST => asked += 1,
                op => panic!("{op}"),
            }
            got.extend(data);
        }
        assert!(under_way <= GUEST_BUF as usize);
        // Nothing more comes, and nobody is asked twice.
        guest.expect_nothing();
        // The guest reads everything.
        let update = Header {
            fwd_cnt: got.len() as u32,
            ..packet(OP_CREDIT_UPDATE, 52)
        };
        guest.queue(update, b"");
    }
    assert!(got == bytes);
    assert!(
        asked > 0 && asked <= (1 << 20) / GUEST_BUF as usize + 1,
        "{asked}"
    );
}

#[test]
fn a_guest_that_can_keep_nothing_is_sent_nothing_until_it_can() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    let nothing = Header {
        buf_alloc: 0,
        ..packet(OP_CREDIT_UPDATE, 52)
    };
    guest.send(nothing, b"");
    program.write_all(b"0123456789").unwrap();
    guest.pump();
    guest.expect(OP_CREDIT_REQUEST, 52, GUEST);
    for _ in 0..10 {
        guest.send(nothing, b"");
        guest.expect_nothing();
    }
    // Four bytes at a time.
    let mut got = Vec::new();
    for fwd_cnt in [0, 4, 8] {
        let some = Header {
            buf_alloc: 4,
            fwd_cnt,
            ..packet(OP_CREDIT_UPDATE, 52)
        };
        guest.send(some, b"");
        got.push(guest.expect(OP_RW, 52, GUEST).1);
        guest.arrived.clear();
    }
    assert_eq!(got.concat(), b"0123456789");
}

#[test]
fn data_wait_for_buffers_of_the_guest_and_connections_take_turns() {
    let mut guest = Guest::with_room(100);
    guest.posts = false;
    let listener = guest.listen(52);
    guest.driver.send(RX, &[], &[144]);
    guest.driver.send(RX, &[], &[144]);
    guest.posted = 2;
    let mut programs = Vec::new();
    for source in [GUEST, GUEST + 1] {
        let request = Header {
            src_port: source,
            ..packet(OP_REQUEST, 52)
        };
        guest.send(request, b"");
        guest.expect(OP_RESPONSE, 52, source);
        programs.push(listener.accept().unwrap().0);
    }
    for program in &mut programs {
        program.write_all(&[5; 1000]).unwrap();
    }
    guest.pump();
    assert!(guest.arrived.is_empty());
    let mut sources = Vec::new();
    for _ in 0..20 {
        guest.driver.send(RX, &[], &[20, 24, 50, 50]);
        guest.posted += 1;
        guest.pump();
        let (header, data) = guest.arrived.pop_front().unwrap();
        assert_eq!((header.op, data), (OP_RW, vec![5; 100]));
        sources.push(header.dst_port);
    }
    let expected: Vec<u32> = [GUEST, GUEST + 1].into_iter().cycle().take(20).collect();
    assert_eq!(sources, expected);
}

#[test]
fn one_program_that_does_not_read_holds_nobody_else_up() {
    let mut guest = Guest::new();
    let mut reader = guest.connected(51);
    let _stopped = guest.connected(52);
    let mut sender = Sender::new(52, pattern(1 << 20));
    sender.go_on(&mut guest);
    let mut other = Sender::new(51, pattern(300_000));
    let mut got = Vec::new();
    while got.len() < other.bytes.len() {
        other.go_on(&mut guest);
        got.extend(available(&mut reader));
        guest.pump();
    }
    assert!(got == other.bytes);
}
