//! Sets up the network as the plan says.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::Failure;
use crate::dhcp::{Answer, Client, Lease};
use crate::news::wait_until;
use crate::plan::Network;
use crate::sys::{self, Interface, Packets, PollFd};

/// How long an interface may take to appear, and a DHCP server to answer all in all.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long before a first question is repeated; it doubles from question to question.
const FIRST_WAIT: Duration = Duration::from_millis(500);

pub fn set_up(network: &Network) -> Result<(), Failure> {
    if *network != Network::None {
        Interface::open("lo")
            .and_then(|lo| lo.bring_up())
            .map_err(|error| format!("the loopback interface cannot be brought up: {error}"))?;
    }
    match network {
        Network::None | Network::Loopback => Ok(()),
        Network::Dhcp { interface } => {
            let failed = |error: io::Error| {
                format!("the network interface {interface} cannot be set up by DHCP: {error}")
            };
            let card = find(interface)?;
            let lease = ask(&card).map_err(failed)?.ok_or_else(|| {
                format!("no DHCP server answers on the network interface {interface}")
            })?;
            if let Some(mtu) = lease.mtu {
                let _ = card.set_mtu(mtu);
            }
            configure(&card, lease.address, lease.prefix, lease.router).map_err(failed)?;
            write_resolv_conf(&lease.dns);
            Ok(())
        }
        Network::Static {
            interface,
            address,
            prefix,
            gateway,
            dns,
        } => {
            let card = find(interface)?;
            card.bring_up()
                .and_then(|()| configure(&card, *address, *prefix, *gateway))
                .map_err(|error| {
                    format!("the network interface {interface} cannot be set up: {error}")
                })?;
            write_resolv_conf(dns);
            Ok(())
        }
    }
}

fn find(name: &str) -> Result<Interface, Failure> {
    wait_until(PATIENCE, || Interface::open(name).ok())
        .ok_or_else(|| format!("there is no network interface {name}"))
}

fn configure(
    card: &Interface,
    address: Ipv4Addr,
    prefix: u8,
    gateway: Option<Ipv4Addr>,
) -> io::Result<()> {
    card.set_address(address, prefix)?;
    let Some(gateway) = gateway else {
        return Ok(());
    };
    let shift = 32 - u32::from(prefix.min(32));
    let network = |address: Ipv4Addr| u64::from(address.to_bits()) >> shift;
    if network(address) != network(gateway) {
        // A gateway outside of the network is reached on the wire all the same.
        card.add_route(Some(gateway), None)?;
    }
    card.add_route(None, Some(gateway))
}

/// Asks for an address; `None` when nobody answers.
fn ask(card: &Interface) -> io::Result<Option<Lease>> {
    card.bring_up()?;
    let mac = card.mac()?;
    let [.., a, b, c, d] = mac;
    let now = sys::since_boot().subsec_nanos();
    let client = Client {
        transaction: u32::from_be_bytes([a, b, c, d]) ^ now,
        mac,
    };
    let packets = card.packets()?;
    let start = Instant::now();
    let mut wait = FIRST_WAIT;
    let mut offer: Option<Lease> = None;
    while start.elapsed() < PATIENCE {
        packets.broadcast(&match &offer {
            Some(offer) => client.request(offer),
            None => client.discover(),
        })?;
        match listen(&client, &packets, wait)? {
            Some(Answer::Acknowledged(lease)) => return Ok(Some(lease)),
            Some(Answer::Offer(lease)) if offer.is_none() => offer = Some(lease),
            _ => {
                offer = None;
                wait = wait.saturating_mul(2);
            }
        }
    }
    Ok(None)
}

/// The next answer, if one comes in time.
fn listen(client: &Client, packets: &Packets, wait: Duration) -> io::Result<Option<Answer>> {
    let start = Instant::now();
    let mut buffer = [0; 2048];
    loop {
        while let Ok(len) = sys::receive(&packets.socket, &mut buffer) {
            if let Some(answer) = client.read(buffer.get(..len).unwrap_or_default()) {
                return Ok(Some(answer));
            }
        }
        let Some(left) = wait.checked_sub(start.elapsed()) else {
            return Ok(None);
        };
        let mut fds = [PollFd::new(packets.socket.as_fd(), sys::POLLIN)];
        sys::wait_for(&mut fds, Some(left))?;
    }
}

/// Names the servers to ask for names. A file that cannot be written is left as it is.
fn write_resolv_conf(servers: &[Ipv4Addr]) {
    const PATH: &str = "/etc/resolv.conf";
    const IN_MEMORY: &str = "/run/sarang-resolv.conf";
    if servers.is_empty() {
        return;
    }
    let text: String = servers
        .iter()
        .map(|server| format!("nameserver {server}\n"))
        .collect();
    // It is often a link to a file of a service that does not run here.
    if Path::new(PATH).is_symlink() {
        let _ = fs::remove_file(PATH);
    }
    let _ = fs::create_dir_all("/etc");
    if fs::write(PATH, &text).is_err() && fs::write(IN_MEMORY, &text).is_ok() {
        let (from, to) = (IN_MEMORY.as_ref(), PATH.as_ref());
        let _ = sys::mount_at(from, to, "", sys::MS_BIND, "".as_ref());
    }
}
