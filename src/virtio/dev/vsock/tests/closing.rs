//! How connections end, half by half or at once.

use std::net::Shutdown;

use super::*;

#[test]
fn a_guest_that_closes_is_answered_as_soon_as_its_data_have_been_passed_on() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    guest.queue(data(52, 4), b"last");
    guest.send(shutdown(52, SHUTDOWN_BOTH), b"");
    guest.expect(OP_RST, 52, GUEST);
    guest.expect_nothing();
    assert_eq!(available(&mut program), b"last");
    assert!(is_closed(&mut program));
    // The pair can be used again at once.
    std::fs::remove_file(guest.port(52)).unwrap();
    guest.connected(52);
}

/// Fills the socket, and what is kept behind it, of a program that does not read.
fn fill(guest: &mut Guest, port: u32) -> usize {
    let mut sent = 0;
    let mut forwarded = 0;
    loop {
        for (header, _) in guest.arrived.drain(..) {
            forwarded = header.fwd_cnt as usize;
        }
        let credit = (BUF_ALLOC as usize + forwarded - sent).min(16 << 10);
        if credit == 0 {
            return sent;
        }
        guest.send(data(port, credit), &vec![8; credit]);
        sent += credit;
    }
}

#[test]
fn a_guest_that_closes_waits_for_a_program_that_reads_slowly() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    let sent = fill(&mut guest, 52);
    guest.send(shutdown(52, SHUTDOWN_BOTH), b"");
    guest.expect_nothing();
    let mut got = 0;
    while got < sent {
        got += available(&mut program).len();
        guest.pump();
    }
    guest.expect(OP_RST, 52, GUEST);
    assert_eq!(got, sent);
    assert!(is_closed(&mut program));
    assert_eq!(guest.device.connections.len(), 0);
}

#[test]
fn a_guest_that_does_not_wait_any_longer_loses_no_data() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    let sent = fill(&mut guest, 52);
    guest.send(shutdown(52, SHUTDOWN_BOTH), b"");
    guest.send(packet(OP_RST, 52), b"");
    // It uses the pair of ports again meanwhile.
    std::fs::remove_file(guest.port(52)).unwrap();
    let mut next = guest.connected(52);
    guest.send(data(52, 3), b"new");
    assert_eq!(available(&mut next), b"new");
    let mut got = 0;
    while got < sent {
        got += available(&mut program).len();
        guest.pump();
    }
    assert_eq!(got, sent);
    assert!(is_closed(&mut program));
    assert_eq!(guest.device.connections.len(), 1);
    guest.expect_nothing();
}

#[test]
fn a_program_that_hangs_up_while_it_is_waited_for_is_not_waited_for() {
    for reset in [false, true] {
        let mut guest = Guest::new();
        let program = guest.connected(52);
        fill(&mut guest, 52);
        guest.send(shutdown(52, SHUTDOWN_BOTH), b"");
        if reset {
            guest.send(packet(OP_RST, 52), b"");
        }
        assert_eq!(guest.device.connections.len(), 1);
        drop(program);
        guest.pump();
        if !reset {
            guest.expect(OP_RST, 52, GUEST);
        }
        guest.expect_nothing();
        assert_eq!(guest.device.connections.len(), 0);
    }
}

#[test]
fn a_guest_may_end_its_sending_half_alone() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    guest.queue(data(52, 8), b"question");
    guest.send(shutdown(52, SHUTDOWN_SEND), b"");
    let mut question = String::new();
    program.set_nonblocking(false).unwrap();
    program.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    program.write_all(b"answer").unwrap();
    guest.pump();
    assert_eq!(guest.expect(OP_RW, 52, GUEST).1, b"answer");
    drop(program);
    guest.pump();
    let flags: Vec<u32> = guest.arrived.drain(..).map(|(end, _)| end.flags).collect();
    assert_eq!(flags.last(), Some(&SHUTDOWN_BOTH));
    guest.send(packet(OP_RST, 52), b"");
    assert_eq!(guest.device.connections.len(), 0);
}

#[test]
fn a_guest_may_end_its_receiving_half_alone() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    guest.send(shutdown(52, SHUTDOWN_RECEIVE), b"");
    let error = program.write_all(b"for nobody").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    guest.send(data(52, 5), b"still");
    assert_eq!(available(&mut program), b"still");
    guest.expect_nothing();
    guest.send(shutdown(52, SHUTDOWN_SEND), b"");
    guest.expect(OP_RST, 52, GUEST);
}

#[test]
fn the_end_of_what_a_program_sends_is_told_and_the_other_half_stays_open() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    program.write_all(b"request").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    guest.pump();
    assert_eq!(guest.expect(OP_RW, 52, GUEST).1, b"request");
    let (end, _) = guest.expect(OP_SHUTDOWN, 52, GUEST);
    assert_eq!(end.flags, SHUTDOWN_SEND);
    guest.send(data(52, 8), b"response");
    assert_eq!(available(&mut program), b"response");
    guest.expect_nothing();
    guest.send(shutdown(52, SHUTDOWN_BOTH), b"");
    guest.expect(OP_RST, 52, GUEST);
    assert!(is_closed(&mut program));
}

#[test]
fn a_program_that_reads_no_more_is_told_and_what_the_guest_sends_is_dropped() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    program.shutdown(Shutdown::Read).unwrap();
    // It cannot be seen before something is sent.
    guest.send(data(52, 4), b"lost");
    let (end, _) = guest.expect(OP_SHUTDOWN, 52, GUEST);
    assert_eq!((end.flags, end.fwd_cnt), (SHUTDOWN_RECEIVE, 4));
    let mut sent = 4;
    while sent < 1 << 20 {
        guest.send(data(52, 16 << 10), &[0; 16 << 10]);
        sent += 16 << 10;
    }
    assert!(
        guest
            .arrived
            .drain(..)
            .all(|(header, _)| header.op == OP_CREDIT_UPDATE)
    );
    program.write_all(b"still").unwrap();
    guest.pump();
    assert_eq!(guest.expect(OP_RW, 52, GUEST).1, b"still");
}

#[test]
fn a_program_that_closes_is_read_to_its_end_before_the_guest_is_told() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    let bytes = pattern(50_000);
    program.write_all(&bytes).unwrap();
    // It has not read everything either.
    guest.send(data(52, 6), b"unread");
    drop(program);
    guest.pump();
    let (mut got, mut flags) = (Vec::new(), 0);
    for (header, data) in guest.arrived.drain(..) {
        match header.op {
            OP_RW => {
                assert_eq!(flags & SHUTDOWN_SEND, 0);
                got.extend(data);
            }
            OP_SHUTDOWN => flags = header.flags,
            op => panic!("{op}"),
        }
    }
    assert!(got == bytes);
    assert_eq!(flags, SHUTDOWN_BOTH);
    // The guest's answer, as soon as its own program has read everything.
    guest.send(packet(OP_RST, 52), b"");
    guest.expect_nothing();
    assert_eq!(guest.device.connections.len(), 0);
}

#[test]
fn both_sides_may_close_at_the_same_time() {
    let mut guest = Guest::new();
    let program = guest.connected(52);
    drop(program);
    guest.send(shutdown(52, SHUTDOWN_BOTH), b"");
    let last = guest
        .arrived
        .drain(..)
        .map(|(header, _)| header.op)
        .next_back();
    assert_eq!(last, Some(OP_RST));
    guest.expect_nothing();
    assert_eq!(guest.device.connections.len(), 0);
}
