//! How connections come about, in both directions, and how they do not.

use super::*;

#[test]
fn a_program_of_the_guest_connects_to_one_that_listens_on_the_host() {
    let mut guest = Guest::new();
    let mut program = guest.connected(52);
    guest.send(data(52, 5), b"hello");
    assert_eq!(available(&mut program), b"hello");
    program.write_all(b"welcome").unwrap();
    guest.pump();
    let (header, bytes) = guest.expect(OP_RW, 52, GUEST);
    assert_eq!((bytes.as_slice(), header.fwd_cnt), (&b"welcome"[..], 5));
    guest.expect_nothing();
}

#[test]
fn a_program_of_the_host_connects_to_one_that_listens_in_the_guest() {
    let mut guest = Guest::new();
    let (mut program, port) = guest.connected_by_host();
    assert!((1 << 30..1 << 31).contains(&port));
    program.write_all(b"hello").unwrap();
    guest.pump();
    assert_eq!(guest.expect(OP_RW, port, GUEST).1, b"hello");
    guest.send(data(port, 7), b"welcome");
    assert_eq!(available(&mut program), b"welcome");
}

#[test]
fn nobody_listens_on_the_host() {
    let mut guest = Guest::new();
    guest.send(packet(OP_REQUEST, 52), b"");
    guest.expect(OP_RST, 52, GUEST);
    // Neither does anybody at a socket that was left behind.
    drop(guest.listen(52));
    guest.send(packet(OP_REQUEST, 52), b"");
    guest.expect(OP_RST, 52, GUEST);
    guest.expect_nothing();
    assert_eq!(guest.device.connections.len(), 0);
}

#[test]
fn nobody_listens_in_the_guest() {
    let mut guest = Guest::new();
    let mut program = guest.program("CONNECT 52\n");
    guest.pump();
    let port = guest.expect_any(OP_REQUEST, 52);
    let refusal = Header {
        src_port: 52,
        ..packet(OP_RST, port)
    };
    guest.send(refusal, b"");
    assert!(is_closed(&mut program));
    guest.expect_nothing();
}

#[test]
fn a_line_that_is_no_greeting_closes_the_socket_and_the_guest_hears_nothing() {
    let mut guest = Guest::new();
    for line in [
        "GET / HTTP/1.1\r\n",
        "CONNECT\n",
        "CONNECT port\n",
        "CONNECT 4294967295\n",
        "CONNECT 4294967296\n",
        "CONNECT -1\n",
        "\n",
        "CONNECT 0000000000000052\n",
        "CONNECT 52 and so on and on and on without an end",
    ] {
        let mut program = guest.program(line);
        guest.expect_nothing();
        assert!(is_closed(&mut program), "{line:?}");
    }
    assert_eq!(guest.device.connections.len(), 0);
}

#[test]
fn a_greeting_may_come_byte_by_byte_and_with_data_right_behind() {
    let mut guest = Guest::new();
    let mut program = guest.program("");
    for byte in b"CONNECT 5000\nfirst" {
        assert!(guest.arrived.is_empty() || *byte > b'\n');
        program.write_all(&[*byte]).unwrap();
        guest.pump();
    }
    let port = guest.expect_any(OP_REQUEST, GUEST);
    guest.expect_nothing();
    guest.send(packet(OP_RESPONSE, port), b"");
    assert_eq!(guest.expect(OP_RW, port, GUEST).1, b"first");
    assert_eq!(available(&mut program), format!("OK {port}\n").as_bytes());
}

#[test]
fn a_program_that_says_all_and_ends_its_half_is_heard_and_answered() {
    let mut guest = Guest::new();
    let mut program = guest.program("CONNECT 5000\nquestion");
    program.shutdown(std::net::Shutdown::Write).unwrap();
    guest.pump();
    let port = guest.expect_any(OP_REQUEST, GUEST);
    guest.send(packet(OP_RESPONSE, port), b"");
    assert_eq!(guest.expect(OP_RW, port, GUEST).1, b"question");
    let (end, _) = guest.expect(OP_SHUTDOWN, port, GUEST);
    assert_eq!(end.flags, SHUTDOWN_SEND);
    guest.send(data(port, 6), b"answer");
    let expected = format!("OK {port}\nanswer");
    assert_eq!(available(&mut program), expected.as_bytes());
}

#[test]
fn a_program_that_hangs_up_before_the_guest_has_accepted_is_forgotten() {
    let mut guest = Guest::new();
    // Before its line, and before its end.
    for line in ["", "CONNECT 5"] {
        drop(guest.program(line));
        guest.expect_nothing();
    }
    // Right after it.
    drop(guest.program("CONNECT 5000\n"));
    guest.pump();
    let port = guest.expect_any(OP_REQUEST, GUEST);
    guest.expect(OP_RST, port, GUEST);
    guest.expect_nothing();
    // Before the guest could be told.
    guest.posts = false;
    let used_up = guest.posted;
    let programs: Vec<UnixStream> = (0..used_up).map(|_| guest.program("CONNECT 9\n")).collect();
    guest.pump();
    assert_eq!(guest.arrived.len(), used_up);
    let late = guest.program("CONNECT 5000\n");
    guest.pump();
    assert_eq!(guest.device.connections.len(), used_up + 1);
    drop(late);
    guest.pump();
    assert_eq!(guest.device.connections.len(), used_up);
    // After it was told: it is told of that, too, and its answer comes too late.
    drop(programs);
    guest.posts = true;
    let ports: Vec<u32> = guest
        .arrived
        .drain(..)
        .map(|(header, _)| header.src_port)
        .collect();
    guest.pump();
    for port in &ports {
        guest.expect(OP_RST, *port, 9);
    }
    guest.send(packet(OP_RESPONSE, ports[0]), b"");
    guest.expect(OP_RST, ports[0], GUEST);
    assert_eq!(guest.device.connections.len(), 0);
}

#[test]
fn a_thousand_short_connections_come_and_go_one_after_the_other() {
    let mut guest = Guest::with_room(20);
    let listener = guest.listen(52);
    let mut ports = std::collections::HashSet::new();
    for number in 0..1000_u32 {
        let text = format!("{number}");
        let from = Header {
            src_port: 1024 + number % 7,
            ..packet(OP_REQUEST, 52)
        };
        guest.send(from, b"");
        guest.expect(OP_RESPONSE, 52, from.src_port);
        let (mut program, _) = listener.accept().unwrap();
        let data = Header {
            op: OP_RW,
            len: text.len() as u32,
            ..from
        };
        guest.queue(data, text.as_bytes());
        let end = Header {
            op: OP_SHUTDOWN,
            flags: SHUTDOWN_BOTH,
            ..from
        };
        guest.send(end, b"");
        guest.expect(OP_RST, 52, from.src_port);
        let mut got = String::new();
        program.read_to_string(&mut got).unwrap();
        assert_eq!(got, text);

        let (mut program, port) = guest.connected_by_host();
        assert!(ports.insert(port));
        program.write_all(text.as_bytes()).unwrap();
        drop(program);
        guest.pump();
        let (first, bytes) = guest.arrived.pop_front().unwrap();
        let mut got = (first, bytes);
        while got.0.op == OP_SHUTDOWN && got.0.flags == SHUTDOWN_RECEIVE {
            got = guest.arrived.pop_front().unwrap();
        }
        assert_eq!((got.0.op, got.1.as_slice()), (OP_RW, text.as_bytes()));
        let (end, _) = guest.expect(OP_SHUTDOWN, port, GUEST);
        assert_eq!(end.flags, SHUTDOWN_BOTH);
        guest.send(packet(OP_RST, port), b"");
        guest.expect_nothing();
        assert_eq!(guest.device.connections.len(), 0);
    }
}

#[test]
fn hundreds_connect_at_once_in_both_directions() {
    let mut guest = Guest::with_room(20);
    let listener = guest.listen(52);
    let mut programs: Vec<UnixStream> = (0..200).map(|_| guest.program("CONNECT 5000\n")).collect();
    let mut accepted = Vec::new();
    for number in 0..200 {
        let request = Header {
            src_port: number,
            ..packet(OP_REQUEST, 52)
        };
        guest.send(request, b"");
        // Listeners of the standard library may have a short backlog.
        accepted.push(listener.accept().unwrap().0);
    }
    let requests: Vec<u32> = guest
        .arrived
        .drain(..)
        .filter(|(header, _)| header.op == OP_REQUEST)
        .map(|(header, _)| header.src_port)
        .collect();
    assert_eq!(requests.len(), 200);
    for port in requests {
        guest.send(packet(OP_RESPONSE, port), b"");
    }
    assert_eq!(guest.device.connections.len(), 400);
    for program in &mut programs {
        assert!(available(program).starts_with(b"OK "));
    }
    for program in programs.iter_mut().chain(&mut accepted) {
        program.write_all(b"all at once").unwrap();
    }
    guest.pump();
    let data = guest.arrived.drain(..);
    let count = data.filter(|(_, data)| data == b"all at once").count();
    assert_eq!(count, 400);
}

#[test]
fn beyond_the_limit_both_sides_are_refused_until_a_connection_ends() {
    let mut guest = Guest::new();
    guest.device.connections.limit = 3;
    let first = guest.connected(52);
    let (second, second_port) = guest.connected_by_host();
    let mut greeting = guest.program("CONN");
    guest.pump();
    let _listener = guest.listen(53);
    guest.send(packet(OP_REQUEST, 53), b"");
    guest.expect(OP_RST, 53, GUEST);
    let mut refused = guest.program("CONNECT 5000\n");
    guest.expect_nothing();
    assert!(is_closed(&mut refused));
    assert_eq!(available(&mut greeting), b"", "it goes on");
    // One that the host has closed, and the guest knows, makes room although the guest has not answered.
    drop(second);
    guest.pump();
    guest.arrived.clear();
    guest.send(packet(OP_REQUEST, 53), b"");
    guest.expect(OP_RST, second_port, GUEST);
    guest.expect(OP_RESPONSE, 53, GUEST);
    // And so does one that the guest has given up.
    guest.send(packet(OP_RST, 52), b"");
    drop(first);
    guest.connected_by_host();
    assert_eq!(guest.device.connections.len(), 3);
}

#[test]
fn a_port_of_the_host_is_not_used_twice_at_the_same_time() {
    let mut guest = Guest::new();
    let (_first, port) = guest.connected_by_host();
    // The guest takes the next one for itself.
    let _listener = guest.listen(port + 1);
    guest.send(packet(OP_REQUEST, port + 1), b"");
    guest.expect(OP_RESPONSE, port + 1, GUEST);
    let (_second, second) = guest.connected_by_host();
    assert_eq!(second, port + 2);
    // When all have been used, they begin anew, without those in use.
    guest.device.connections.next_port = (1 << 31) - 1;
    let (_third, third) = guest.connected_by_host();
    let (_fourth, fourth) = guest.connected_by_host();
    assert_eq!((third, fourth), ((1 << 31) - 1, port + 3));
}
