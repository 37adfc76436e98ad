//! The card on a real tap, and with a real passt, in a network namespace of its own.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use super::*;
use crate::backend::net::{Forward, Passt, Tap, namespace};

const OURS: [u8; 4] = [10, 9, 8, 2];
const HOSTS: [u8; 4] = [10, 9, 8, 1];

/// A card on a tap of a host at 10.9.8.1 that knows 10.9.8.2 to be us.
fn on_tap(queues: u16) -> Net {
    let tap = Tap::open("card", queues).unwrap();
    namespace::run("ip link set card up addrgenmode none");
    namespace::run("ip addr add 10.9.8.1/24 dev card");
    namespace::run(&format!(
        "ip neigh replace 10.9.8.2 lladdr {} dev card nud permanent",
        mac()
    ));
    Net::new(0, mac(), Box::new(tap))
}

/// Does what the event loop does, until `done` or for at most 10 seconds; `false` when nothing is ready for 300 ms.
fn serve(net: &mut Net, mut done: impl FnMut(&mut Net) -> bool) -> bool {
    let start = Instant::now();
    while !done(net) {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "it takes too long"
        );
        if !turn(net) {
            return false;
        }
    }
    true
}

/// An ARP request for `target` (RFC 826).
fn arp_request(target: [u8; 4]) -> Vec<u8> {
    let mut frame = [0xff; 6].to_vec();
    frame.extend(mac().bytes());
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac().bytes());
    frame.extend(OURS);
    frame.extend([0; 6]);
    frame.extend(target);
    frame
}

fn is_arp_reply(frame: &[u8], from: [u8; 4]) -> bool {
    frame.len() >= 42
        && frame[..6] == mac().bytes()
        && frame[12..14] == [8, 6]
        && frame[20..22] == [0, 2]
        && frame[28..32] == from
}

/// Whether `frame` is a UDP datagram to port 7, and its payload.
fn datagram(frame: &[u8]) -> Option<&[u8]> {
    (frame.len() > 42 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == [0, 7])
        .then(|| &frame[42..])
}

#[test]
fn an_arp_request_is_answered_by_the_hosts_stack() {
    if !namespace::entered(
        "virtio::dev::net::tests::on_a_host::an_arp_request_is_answered_by_the_hosts_stack",
    ) {
        return;
    }
    let mut net = on_tap(1);
    let features = net.features() | F_VERSION_1 | F_EVENT_IDX;
    assert_ne!(features & VIRTIO_NET_F_HOST_TSO4, 0);
    let mut driver = start(&mut net, features);
    for _ in 0..16 {
        driver.send(RX, &[], &[2048]);
    }
    net.process(RX).unwrap();
    let request = arp_request(HOSTS);
    let head = driver.send(TX, &[&HEADER, &request[..10], &request[10..]], &[]);
    net.process(TX).unwrap();
    let used = driver.used(TX).unwrap();
    assert_eq!((used.head, used.len), (head, 0));
    let mut answered = false;
    assert!(serve(&mut net, |_| {
        while let Some((_, frame, buffers)) = received(&mut driver, RX) {
            assert_eq!(buffers, 1);
            answered |= is_arp_reply(&frame, HOSTS);
        }
        answered
    }));
    assert!(driver.line.edges() >= 2);
    assert_eq!(net.counters().sent, 1);

    // What the host's stack cannot make sense of is dropped and handed back.
    let bad_header = [0xff; 12];
    driver.send(TX, &[&bad_header, &request], &[]);
    driver.send(TX, &[&HEADER, &[0; 13]], &[]);
    driver.send(TX, &[&HEADER, &[0; 65_551]], &[]);
    namespace::run("ip link set card down");
    driver.send(TX, &[&HEADER, &request], &[]);
    net.process(TX).unwrap();
    assert_eq!(std::iter::from_fn(|| driver.used(TX)).count(), 4);
    assert_eq!(net.counters().transmit_dropped, 4);
}

#[test]
fn a_frame_that_is_longer_than_one_buffer_takes_several_or_is_dropped_whole() {
    if !namespace::entered(
        "virtio::dev::net::tests::on_a_host::a_frame_that_is_longer_than_one_buffer_takes_several_or_is_dropped_whole",
    ) {
        return;
    }
    let mut net = on_tap(1);
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    let payload: Vec<u8> = (0..1400).map(|i| i as u8).collect();

    let mut driver = start(&mut net, MERGE);
    for _ in 0..16 {
        driver.send(RX, &[], &[300, 212]);
    }
    net.process(RX).unwrap();
    socket.send_to(&payload, "10.9.8.2:7").unwrap();
    let mut got = None;
    assert!(serve(&mut net, |_| {
        while let Some((header, frame, buffers)) = received(&mut driver, RX) {
            if let Some(data) = datagram(&frame) {
                assert_eq!(header[0], 0, "no checksum offload was agreed on");
                got = Some((data.to_vec(), buffers));
            }
        }
        got.is_some()
    }));
    // 12 + 14 + 28 + 1400 bytes in buffers of 512.
    assert_eq!(got, Some((payload.clone(), 3)));

    // Longer than what was expected after the last. The host may have sent frames of its own meanwhile.
    for _ in 0..8 {
        driver.send(RX, &[], &[300, 212]);
    }
    net.process(RX).unwrap();
    namespace::run("ip link set card mtu 9000");
    let long: Vec<u8> = (0..5000).map(|i| (i / 5) as u8).collect();
    socket.send_to(&long, "10.9.8.2:7").unwrap();
    got = None;
    assert!(serve(&mut net, |_| {
        while let Some((_, frame, buffers)) = received(&mut driver, RX) {
            got = datagram(&frame)
                .map(|data| (data.to_vec(), buffers))
                .or(got.take());
        }
        got.is_some()
    }));
    assert_eq!(got, Some((long, 10)));
    namespace::run("ip link set card mtu 1500");

    net.reset();
    assert!(net.interests().iter().all(|interest| interest.is_empty()));
    let mut driver = start(&mut net, PLAIN);
    for _ in 0..4 {
        driver.send(RX, &[], &[300, 212]);
    }
    net.process(RX).unwrap();
    let before = net.counters();
    socket.send_to(&payload, "10.9.8.2:7").unwrap();
    socket.send_to(b"short", "10.9.8.2:7").unwrap();
    let mut got = Vec::new();
    assert!(serve(&mut net, |_| {
        while let Some((_, frame, buffers)) = received(&mut driver, RX) {
            assert_eq!(buffers, 1);
            if let Some(data) = datagram(&frame) {
                got.push(data.to_vec());
            }
        }
        !got.is_empty()
    }));
    assert_eq!(got, [b"short"]);
    assert_eq!(net.counters().receive_dropped, before.receive_dropped + 1);
}

#[test]
fn without_buffers_nothing_spins_and_frames_wait_in_the_host() {
    if !namespace::entered(
        "virtio::dev::net::tests::on_a_host::without_buffers_nothing_spins_and_frames_wait_in_the_host",
    ) {
        return;
    }
    let mut net = on_tap(1);
    let mut driver = start(&mut net, MERGE | F_EVENT_IDX);
    assert_eq!(net.interests(), [Interest::NONE]);
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    for number in 0..300_u32 {
        socket.send_to(&number.to_le_bytes(), "10.9.8.2:7").unwrap();
    }
    assert_eq!(net.interests(), [Interest::NONE]);
    let mut next = 0_u32;
    while next < 300 {
        for _ in 0..50 {
            driver.send(RX, &[], &[1526]);
        }
        let edges = driver.line.edges();
        net.process(RX).unwrap();
        assert!(driver.line.edges() <= edges + 1, "one interrupt for many");
        serve(&mut net, |net| net.interests() == [Interest::NONE]);
        while let Some((_, frame, _)) = received(&mut driver, RX) {
            if let Some(data) = datagram(&frame) {
                assert_eq!(data, next.to_le_bytes());
                next += 1;
            }
        }
    }
    assert_eq!(net.counters().receive_dropped, 0);
}

#[test]
fn a_driver_that_offloads_gets_checksums_unfinished() {
    if !namespace::entered(
        "virtio::dev::net::tests::on_a_host::a_driver_that_offloads_gets_checksums_unfinished",
    ) {
        return;
    }
    let mut net = on_tap(1);
    let features = net.features() | F_VERSION_1;
    let mut driver = start(&mut net, features);
    driver.send(RX, &[], &[2048]);
    net.process(RX).unwrap();
    let socket = UdpSocket::bind("10.9.8.1:0").unwrap();
    socket.send_to(b"unfinished", "10.9.8.2:7").unwrap();
    let mut header = Vec::new();
    assert!(serve(&mut net, |net| {
        while let Some((head, frame, _)) = received(&mut driver, RX) {
            if datagram(&frame).is_some() {
                header = head;
            }
            // It was a frame of the host's own: the next takes another buffer.
            driver.send(RX, &[], &[2048]);
            net.process(RX).unwrap();
        }
        !header.is_empty()
    }));
    // NEEDS_CSUM, from byte 34 on, at offset 6 of the UDP header (§5.1.6).
    assert_eq!(header[..10], [1, 0, 0, 0, 0, 0, 34, 0, 6, 0]);
}

#[test]
fn the_driver_says_how_many_pairs_of_queues_it_uses() {
    if !namespace::entered(
        "virtio::dev::net::tests::on_a_host::the_driver_says_how_many_pairs_of_queues_it_uses",
    ) {
        return;
    }
    let mut net = on_tap(3);
    assert_eq!(net.queue_sizes(), [256, 256, 256, 256, 256, 256, 64]);
    let mut pairs = [0; 2];
    net.read_config(8, &mut pairs);
    assert_eq!(pairs, [3, 0]);
    let mut driver = start(&mut net, MERGE | VIRTIO_NET_F_CTRL_VQ | VIRTIO_NET_F_MQ);
    let ask = |driver: &mut Driver, net: &mut Net, words: &[&[u8]]| {
        let head = driver.send(6, words, &[1]);
        net.process(6).unwrap();
        let used = driver.used(6).unwrap();
        assert_eq!((used.head, used.len), (head, 1));
        driver.written(6, head)[0]
    };
    for (words, ack) in [
        (&[&[4, 0][..], &[2, 0]][..], 0),
        (&[&[4, 0], &[0, 0]], 1),
        (&[&[4, 0], &[4, 0]], 1),
        (&[&[4, 0], &[0xff, 0xff]], 1),
        (&[&[4, 0], &[2]], 1),
        (&[&[4, 1], &[2, 0]], 1),
        (&[&[0x77, 0], &[2, 0]], 1),
        (&[&[1, 0], &[1]], 1),
        (&[], 1),
    ] {
        assert_eq!(ask(&mut driver, &mut net, words), ack, "{words:?}");
    }
    assert_eq!(net.state.pairs, 2);
    for queue in [0, 2] {
        for _ in 0..8 {
            driver.send(queue, &[], &[2048]);
        }
        net.process(queue).unwrap();
    }
    let expected = [Interest::READ, Interest::READ, Interest::NONE];
    assert_eq!(net.interests(), expected);
    driver.send(3, &[&HEADER, &arp_request(HOSTS)], &[]);
    net.process(3).unwrap();
    assert!(driver.used(3).is_some());
    let mut answered = false;
    assert!(serve(&mut net, |_| {
        for queue in [0, 2] {
            while let Some((_, frame, _)) = received(&mut driver, queue) {
                answered |= is_arp_reply(&frame, HOSTS);
            }
        }
        answered
    }));
    let saved = net.save();
    net.reset();
    assert_eq!(net.state.pairs, 1);
    net.restore(&saved).unwrap();
    assert_eq!((net.state.pairs, net.counters().sent), (2, 1));

    driver.send(6, &[&[4, 0], &[1, 0]], &[]);
    let mut driver = start(&mut net, MERGE | VIRTIO_NET_F_CTRL_VQ);
    // Without MQ, the control queue is number 2.
    let head = driver.send(2, &[&[4, 0], &[1, 0]], &[1]);
    net.process(2).unwrap();
    assert_eq!(driver.written(2, head), [0]);
    driver.send(2, &[&[4, 0], &[1, 0]], &[]);
    assert_eq!(
        net.process(2),
        Err(Malformed::Request),
        "no place to answer"
    );
}

#[test]
fn passt_answers_the_guest_and_leads_a_port_of_the_host_to_it() {
    if !namespace::entered(
        "virtio::dev::net::tests::on_a_host::passt_answers_the_guest_and_leads_a_port_of_the_host_to_it",
    ) {
        return;
    }
    // No interface with a route, so passt has nothing to offer the guest.
    let mut lost = match Passt::start(&[]) {
        Err(error) => {
            assert!(error.to_string().contains("install it"), "{error}");
            println!("skipped: {error}");
            return;
        }
        Ok(passt) => passt,
    };
    let error = lost.settle().unwrap_err().to_string();
    assert!(error.contains("interface"), "{error}");

    let _outside = Tap::open("outside", 1).unwrap();
    namespace::run("ip addr add 10.9.8.2/24 dev outside");
    namespace::run("ip link set outside up");
    namespace::run("ip route add default via 10.9.8.1");
    let ssh = Forward {
        host: 2222,
        guest: 22,
    };
    let mut passt = Passt::start(&[ssh]).unwrap();
    passt.settle().unwrap();
    let error = Passt::start(&[ssh]).unwrap().settle().unwrap_err();
    assert!(error.to_string().contains("2222"), "{error}");
    let mut net = Net::new(0, mac(), Box::new(passt));
    let mut driver = start(&mut net, MERGE);
    for _ in 0..32 {
        driver.send(RX, &[], &[2048]);
    }
    net.process(RX).unwrap();
    driver.send(TX, &[&HEADER, &arp_request(HOSTS)], &[]);
    net.process(TX).unwrap();
    let mut answered = false;
    assert!(serve(&mut net, |_| {
        while let Some((_, frame, _)) = received(&mut driver, RX) {
            answered |= is_arp_reply(&frame, HOSTS);
        }
        answered
    }));
    // A connection to the host's port becomes a SYN to the guest's port 22.
    let host = std::thread::spawn(|| {
        let address = ([127, 0, 0, 1], 2222).into();
        std::net::TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_ok()
    });
    let mut knocked = false;
    assert!(serve(&mut net, |_| {
        while let Some((_, frame, _)) = received(&mut driver, RX) {
            knocked |= frame.len() > 54
                && frame[12..14] == [8, 0]
                && frame[23] == 6
                && frame[36..38] == [0, 22];
        }
        knocked
    }));
    drop(net);
    host.join().unwrap();
}
