//! One connection as a state machine: packets of the guest and news of the host go in, what the guest is to be told comes
//! out. It knows no socket and no queue.
//!
//! *Credit* (virtio 1.3 §5.10.6.3) keeps a side that sends from drowning one that does not read. Either says in every
//! packet how much it can keep (`buf_alloc`) and how much it has passed on (`fwd_cnt`). What has been sent and not
//! passed on must never exceed what can be kept. All counts are modulo 2^32.
//!
//! A connection ends (§5.10.6.5) when SHUTDOWN packets have said that one side neither receives nor sends any more; the
//! other answers with RST, which tells the first that it may use the same pair of ports again. Each half may be shut down
//! by itself before that. RST without SHUTDOWN refuses or breaks off.

use super::packet::{
    Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};

/// How much data of the guest is kept for each connection while its reader on the host takes none, in bytes.
pub(super) const BUF_ALLOC: u32 = 128 << 10;

/// The longest packet to the guest, in bytes without its header, so that connections take turns.
const PACKET_MAX: u32 = 64 << 10;

/// What is to be done about a packet of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reaction {
    Nothing,
    /// The guest has accepted: tell the program that waits.
    Accepted,
    /// The packet's data are for the host.
    Data,
    /// The guest has broken the rules: send RST and forget the connection.
    Reset,
    /// The guest has forgotten the connection.
    Gone,
}

/// A packet that is due to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Request,
    Response,
    CreditUpdate,
    CreditRequest,
    /// With these flags.
    Shutdown(u32),
    /// At most so many bytes of data, if the host has them.
    Data(u32),
}

/// A connection that the guest knows of, or will as soon as it has been told.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    /// Both sides have agreed.
    established: bool,
    /// `Request` or `Response`, until it has been sent.
    opening: Option<Due>,
    /// The guest waits to be told of its credit.
    credit_update: bool,
    /// The guest has been asked for credit, and gave none yet.
    asked: bool,

    /// Bytes from the guest, and how many of these have been passed on.
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    told: u32,

    /// Bytes to the guest.
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,

    /// Flags of the guest's SHUTDOWN packets, all together.
    guest_shutdown: u32,
    /// The host's, and those of them that the guest knows of.
    host_shutdown: u32,
    told_shutdown: u32,
}

impl Connection {
    /// A program of the host wants to be connected.
    pub fn requested_by_host() -> Connection {
        Connection {
            established: false,
            opening: Some(Due::Request),
            credit_update: false,
            asked: false,
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
        }
    }

    /// The guest wanted to be connected, by this packet, and is.
    pub fn requested_by_guest(request: &Header) -> Connection {
        Connection {
            established: true,
            opening: Some(Due::Response),
            peer_buf_alloc: request.buf_alloc,
            peer_fwd_cnt: request.fwd_cnt,
            ..Connection::requested_by_host()
        }
    }

    /// A packet of the guest for this connection.
    pub fn packet(&mut self, header: &Header) -> Reaction {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked = false;
        }
        match header.op {
            OP_RST => Reaction::Gone,
            OP_CREDIT_UPDATE => Reaction::Nothing,
            OP_CREDIT_REQUEST => {
                self.credit_update = true;
                Reaction::Nothing
            }
            OP_RESPONSE if !self.established && self.opening.is_none() => {
                self.established = true;
                Reaction::Accepted
            }
            OP_RW if self.established && self.may_receive(header.len) => {
                self.received = self.received.wrapping_add(header.len);
                Reaction::Data
            }
            OP_SHUTDOWN if self.established => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                Reaction::Nothing
            }
            _ => Reaction::Reset,
        }
    }

    /// Whether the guest may send `len` bytes now: it has not said that it is done, and they are within its credit.
    fn may_receive(&self, len: u32) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND == 0 && len <= self.guest_credit()
    }

    /// What the guest thinks that it may send.
    fn guest_credit(&self) -> u32 {
        BUF_ALLOC.saturating_sub(self.received.wrapping_sub(self.told))
    }

    /// What may be sent to the guest. Counts that make no sense leave none.
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(under_way)
    }

    /// `len` bytes of the guest's data have been passed on. When it could soon need it, the guest is told.
    pub fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
        if self.guest_credit() < BUF_ALLOC / 2 && self.forwarded != self.told {
            self.credit_update = true;
        }
    }

    /// The host has no more data, takes no more, or both.
    pub fn host_shuts_down(&mut self, flags: u32) {
        self.host_shutdown |= flags;
    }

    /// Whether both sides have agreed.
    pub fn is_established(&self) -> bool {
        self.established
    }

    /// Whether the guest does not know of the connection yet.
    pub fn is_unknown_to_guest(&self) -> bool {
        self.opening == Some(Due::Request)
    }

    /// Whether the guest takes no more data.
    pub fn guest_receives_no_more(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_RECEIVE != 0
    }

    /// Whether the guest sends no more data.
    pub fn guest_sends_no_more(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND != 0
    }

    /// Whether the guest has closed the connection: as soon as its data have been passed on, RST is due.
    pub fn is_closed_by_guest(&self) -> bool {
        self.guest_shutdown == SHUTDOWN_BOTH
    }

    /// Whether the guest knows that the host has closed the connection, and only its RST is missing.
    pub fn awaits_reset(&self) -> bool {
        self.told_shutdown == SHUTDOWN_BOTH
    }

    /// What the guest is to be sent next. `readable` says whether the host may have data.
    pub fn due(&self, readable: bool) -> Option<Due> {
        if self.opening.is_some() {
            return self.opening;
        }
        if !self.established {
            return None;
        }
        if self.host_shutdown != self.told_shutdown {
            return Some(Due::Shutdown(self.host_shutdown));
        }
        if self.credit_update {
            return Some(Due::CreditUpdate);
        }
        if !readable || self.guest_receives_no_more() || self.host_shutdown & SHUTDOWN_SEND != 0 {
            return None;
        }
        match self.credit() {
            0 if self.asked => None,
            0 => Some(Due::CreditRequest),
            credit => Some(Due::Data(credit.min(PACKET_MAX))),
        }
    }

    /// What was due has been sent; `len` is how many bytes of data.
    pub fn done(&mut self, due: Due, len: u32) {
        match due {
            Due::Request | Due::Response => self.opening = None,
            Due::CreditUpdate => {}
            Due::CreditRequest => self.asked = true,
            Due::Shutdown(flags) => self.told_shutdown = flags,
            Due::Data(_) => self.sent = self.sent.wrapping_add(len),
        }
        self.told = self.forwarded;
        self.credit_update = false;
    }

    /// Fills in the fields of a header that say what is due. The addresses are not in it.
    pub fn header(&self, due: Due, len: u32) -> Header {
        let (op, flags) = match due {
            Due::Request => (OP_REQUEST, 0),
            Due::Response => (OP_RESPONSE, 0),
            Due::CreditUpdate => (OP_CREDIT_UPDATE, 0),
            Due::CreditRequest => (OP_CREDIT_REQUEST, 0),
            Due::Shutdown(flags) => (OP_SHUTDOWN, flags),
            Due::Data(_) => (OP_RW, 0),
        };
        Header {
            op,
            flags,
            len,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_guest(op: u16) -> Header {
        Header {
            op,
            buf_alloc: 1000,
            ..Header::default()
        }
    }

    fn data(len: u32) -> Header {
        Header {
            len,
            ..from_guest(OP_RW)
        }
    }

    fn shutdown(flags: u32) -> Header {
        Header {
            flags,
            ..from_guest(OP_SHUTDOWN)
        }
    }

    /// Sends what is due, which must be `expected`.
    fn send(connection: &mut Connection, expected: Due) {
        assert_eq!(connection.due(false), Some(expected));
        connection.done(expected, 0);
    }

    fn established() -> Connection {
        let mut connection = Connection::requested_by_guest(&from_guest(OP_REQUEST));
        send(&mut connection, Due::Response);
        connection
    }

    fn requested() -> Connection {
        let mut connection = Connection::requested_by_host();
        send(&mut connection, Due::Request);
        connection
    }

    #[test]
    fn each_packet_has_its_reaction_in_each_state() {
        use Reaction::{Accepted, Data, Gone, Nothing, Reset};
        // Columns: not told to the guest yet, requested, established, after SHUTDOWN(SEND), after both.
        for (packet, reactions) in [
            (from_guest(OP_REQUEST), [Reset; 5]),
            (
                from_guest(OP_RESPONSE),
                [Reset, Accepted, Reset, Reset, Reset],
            ),
            (from_guest(OP_RST), [Gone; 5]),
            (shutdown(1), [Reset, Reset, Nothing, Nothing, Nothing]),
            (shutdown(3), [Reset, Reset, Nothing, Nothing, Nothing]),
            (shutdown(0), [Reset, Reset, Nothing, Nothing, Nothing]),
            (data(0), [Reset, Reset, Data, Reset, Reset]),
            (data(BUF_ALLOC), [Reset, Reset, Data, Reset, Reset]),
            (data(BUF_ALLOC + 1), [Reset; 5]),
            (data(u32::MAX), [Reset; 5]),
            (from_guest(OP_CREDIT_UPDATE), [Nothing; 5]),
            (from_guest(OP_CREDIT_REQUEST), [Nothing; 5]),
            (from_guest(0), [Reset; 5]),
            (from_guest(8), [Reset; 5]),
            (from_guest(u16::MAX), [Reset; 5]),
        ] {
            let mut half = established();
            half.packet(&shutdown(SHUTDOWN_SEND));
            let mut closed = established();
            closed.packet(&shutdown(SHUTDOWN_BOTH));
            let states = [
                Connection::requested_by_host(),
                requested(),
                established(),
                half,
                closed,
            ];
            for (number, (mut state, reaction)) in states.into_iter().zip(reactions).enumerate() {
                assert_eq!(state.packet(&packet), reaction, "{number}: {packet:?}");
            }
        }
    }

    #[test]
    fn a_host_that_connects_sends_nothing_before_the_guest_has_accepted() {
        let mut connection = Connection::requested_by_host();
        assert!(connection.is_unknown_to_guest());
        connection.host_shuts_down(SHUTDOWN_SEND);
        send(&mut connection, Due::Request);
        assert!(!connection.is_unknown_to_guest());
        assert_eq!(connection.due(true), None);
        assert_eq!(
            connection.packet(&from_guest(OP_RESPONSE)),
            Reaction::Accepted
        );
        send(&mut connection, Due::Shutdown(SHUTDOWN_SEND));
    }

    #[test]
    fn the_guest_is_never_sent_more_than_its_credit_whatever_it_counts() {
        for (buf_alloc, fwd_cnt, sent, credit) in [
            (1000, 0, 0, 1000),
            (1000, 0, 400, 600),
            (1000, 400, 1000, 400),
            (1000, 0, 1000, 0),
            (0, 0, 0, 0),
            // It says that it can keep less than it could before.
            (100, 0, 400, 0),
            // It has passed on more than it was sent.
            (1000, 401, 400, 0),
            (u32::MAX, 401, 400, 0),
            // Counts wrap around.
            (1000, u32::MAX - 99, 100, 800),
            (u32::MAX, 0, 0, u32::MAX),
        ] {
            let mut connection = established();
            connection.done(Due::Data(sent), sent);
            let update = Header {
                buf_alloc,
                fwd_cnt,
                ..from_guest(OP_CREDIT_UPDATE)
            };
            assert_eq!(connection.packet(&update), Reaction::Nothing);
            let expected = match credit {
                0 => Due::CreditRequest,
                credit => Due::Data(credit.min(PACKET_MAX)),
            };
            assert_eq!(connection.credit(), credit, "{update:?} {sent}");
            assert_eq!(connection.due(true), Some(expected));
            assert_eq!(connection.due(false), None);
        }
    }

    #[test]
    fn a_guest_without_credit_is_asked_once_each_time_that_it_runs_out() {
        let mut connection = established();
        for round in 1..4 {
            connection.done(Due::Data(1000), 1000);
            assert_eq!(connection.due(true), Some(Due::CreditRequest));
            connection.done(Due::CreditRequest, 0);
            assert_eq!(connection.due(true), None);
            let update = Header {
                fwd_cnt: round * 1000,
                ..from_guest(OP_CREDIT_UPDATE)
            };
            connection.packet(&update);
            assert_eq!(connection.due(true), Some(Due::Data(1000)));
        }
    }

    #[test]
    fn the_guest_may_send_what_it_was_told_can_be_kept_and_not_a_byte_more() {
        let mut connection = established();
        assert_eq!(connection.packet(&data(BUF_ALLOC)), Reaction::Data);
        assert_eq!(connection.clone().packet(&data(1)), Reaction::Reset);
        connection.forward(5000);
        // It could not know yet.
        assert_eq!(connection.clone().packet(&data(1)), Reaction::Reset);
        send(&mut connection, Due::CreditUpdate);
        assert_eq!(connection.packet(&data(5000)), Reaction::Data);
        assert_eq!(connection.packet(&data(1)), Reaction::Reset);
    }

    #[test]
    fn the_guest_is_told_of_its_credit_when_half_of_it_is_used_up_or_when_it_asks() {
        let mut connection = established();
        connection.packet(&data(BUF_ALLOC / 2));
        connection.forward(BUF_ALLOC / 2);
        assert_eq!(connection.due(false), None);
        connection.packet(&data(1));
        connection.forward(1);
        assert_eq!(
            connection.header(Due::CreditUpdate, 0).fwd_cnt,
            BUF_ALLOC / 2 + 1
        );
        send(&mut connection, Due::CreditUpdate);
        assert_eq!(connection.due(false), None);
        connection.packet(&from_guest(OP_CREDIT_REQUEST));
        send(&mut connection, Due::CreditUpdate);
        // Any packet says the same.
        connection.packet(&from_guest(OP_CREDIT_REQUEST));
        connection.done(Due::Data(10), 10);
        assert_eq!(connection.due(false), None);
    }

    #[test]
    fn counts_go_on_over_four_gigabytes() {
        let mut connection = established();
        for _ in 0..70_000 {
            assert_eq!(connection.packet(&data(BUF_ALLOC)), Reaction::Data);
            connection.forward(BUF_ALLOC);
            send(&mut connection, Due::CreditUpdate);
        }
        assert!(connection.forwarded < BUF_ALLOC * 10_000);
        assert_eq!(connection.packet(&data(BUF_ALLOC)), Reaction::Data);
    }

    #[test]
    fn each_half_is_shut_down_by_itself_and_told_once() {
        let mut connection = established();
        connection.host_shuts_down(SHUTDOWN_RECEIVE);
        send(&mut connection, Due::Shutdown(SHUTDOWN_RECEIVE));
        assert_eq!(connection.due(true), Some(Due::Data(1000)));
        connection.host_shuts_down(SHUTDOWN_SEND);
        connection.host_shuts_down(SHUTDOWN_SEND);
        assert!(!connection.awaits_reset());
        send(&mut connection, Due::Shutdown(SHUTDOWN_BOTH));
        assert!(connection.awaits_reset());
        assert_eq!(connection.due(true), None);

        let mut connection = established();
        connection.packet(&shutdown(SHUTDOWN_RECEIVE));
        assert_eq!(connection.due(true), None);
        assert!(connection.guest_receives_no_more() && !connection.guest_sends_no_more());
        assert_eq!(connection.packet(&data(5)), Reaction::Data);
        connection.packet(&shutdown(SHUTDOWN_SEND | 1 << 9));
        assert!(connection.is_closed_by_guest());
    }
}
