//! `--net`: which network cards a guest has, and what is at the other end of each one's wire.
//!
//! A value is a kind, and options of that kind, with commas between them. An option that a kind does not know is refused
//! with a list of those that it does.

use std::collections::HashSet;
use std::fmt;

use super::{Result, options, quantity};
use crate::backend::net::{Forward, NetBackend, Passt, QUEUES_MAX, Tap, check_name};
use crate::backend::rate::Limits;
use crate::virtio::VirtioDevice;
use crate::virtio::dev::net::{Mac, Net};

const KINDS: &str = "a network is tap=NAME, user or none";

/// One `--net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Network {
    /// No network card.
    None,
    /// A tap of the host.
    Tap {
        name: String,
        /// Pairs of queues.
        queues: u16,
        card: Card,
    },
    /// passt.
    User { forwards: Vec<Forward>, card: Card },
}

/// What a network card of any kind may be given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Card {
    mac: Option<Mac>,
    /// Of each direction.
    limits: Limits,
    own_worker: bool,
}

/// How these options are written.
const CARD_OPTIONS: &str = "mac=MAC, bw=RATE, iops=N and worker=own|shared";

impl Card {
    /// Takes an option; `false` when it is none of a card's.
    fn take(&mut self, option: &str) -> std::result::Result<bool, String> {
        match option.split_once('=') {
            Some(("mac", value)) => self.mac = Some(value.parse()?),
            Some(("bw", value)) => self.limits.bandwidth = Some(quantity::bandwidth(value)?),
            Some(("iops", value)) => self.limits.operations = Some(quantity::operations(value)?),
            Some(("worker", value)) => self.own_worker = options::own_worker(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl fmt::Display for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Card {
            mac,
            limits,
            own_worker,
        } = self;
        if let Some(mac) = mac {
            write!(f, ",mac={mac}")?;
        }
        if let Some(bandwidth) = limits.bandwidth {
            write!(f, ",bw={bandwidth}")?;
        }
        if let Some(operations) = limits.operations {
            write!(f, ",iops={operations}")?;
        }
        if *own_worker {
            f.write_str(",worker=own")?;
        }
        Ok(())
    }
}

/// Parses one `--net`.
///
/// # Errors
/// One sentence that lists what is known.
pub(super) fn parse(text: &str) -> std::result::Result<Network, String> {
    let (kind, options) = match text.split_once(',') {
        Some((kind, options)) => (kind, options.split(',').collect()),
        None => (text, Vec::new()),
    };
    match kind.split_once('=') {
        None if kind == "none" && options.is_empty() => Ok(Network::None),
        None if kind == "none" => Err("none has no options".to_owned()),
        None if kind == "user" => user(&options),
        Some(("tap", name)) => tap(name, &options),
        None if kind == "tap" => Err("a tap needs a name: write tap=NAME".to_owned()),
        _ => Err(format!("`{kind}` is not known: {KINDS}")),
    }
}

fn tap(name: &str, options: &[&str]) -> std::result::Result<Network, String> {
    check_name(name).map_err(|error| error.to_string())?;
    let (mut card, mut queues) = (Card::default(), 1);
    for option in options {
        if card.take(option)? {
            continue;
        }
        match option.split_once('=') {
            Some(("queues", value)) => {
                queues = value
                    .parse()
                    .ok()
                    .filter(|queues| (1..=QUEUES_MAX).contains(queues))
                    .ok_or_else(|| format!("a network card can have 1 to {QUEUES_MAX} queues"))?;
            }
            _ => return Err(unknown(option, "tap", "queues=N")),
        }
    }
    Ok(Network::Tap {
        name: name.to_owned(),
        queues,
        card,
    })
}

fn user(options: &[&str]) -> std::result::Result<Network, String> {
    let (mut card, mut forwards) = (Card::default(), Vec::new());
    for option in options {
        if card.take(option)? {
            continue;
        }
        match option.split_once('=') {
            Some(("hostfwd", value)) => forwards.push(forward(value)?),
            _ => return Err(unknown(option, "user", "hostfwd=HOST:GUEST")),
        }
    }
    Ok(Network::User { forwards, card })
}

fn unknown(option: &str, kind: &str, known: &str) -> String {
    format!("`{option}` is not an option of {kind}, which knows {known}, {CARD_OPTIONS}")
}

fn forward(text: &str) -> std::result::Result<Forward, String> {
    let port = |text: &str| text.parse().ok().filter(|port| *port > 0);
    text.split_once(':')
        .and_then(|(host, guest)| {
            Some(Forward {
                host: port(host)?,
                guest: port(guest)?,
            })
        })
        .ok_or_else(|| {
            format!(
                "`{text}` does not forward a port: write hostfwd=HOST:GUEST with two TCP ports, such as hostfwd=2222:22"
            )
        })
}

impl Network {
    /// The card, if there is one.
    fn card(&mut self) -> Option<&mut Card> {
        match self {
            Network::None => None,
            Network::Tap { card, .. } | Network::User { card, .. } => Some(card),
        }
    }
}

/// As on the command line.
impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Network::None => f.write_str("none"),
            Network::Tap { name, queues, card } => {
                write!(f, "tap={name}")?;
                if *queues > 1 {
                    write!(f, ",queues={queues}")?;
                }
                card.fmt(f)
            }
            Network::User { forwards, card } => {
                f.write_str("user")?;
                for Forward { host, guest } in forwards {
                    write!(f, ",hostfwd={host}:{guest}")?;
                }
                card.fmt(f)
            }
        }
    }
}

/// All `--net` of one machine together, with the addresses of all cards decided on.
///
/// # Errors
/// One sentence, when they do not go together.
pub(super) fn resolve(
    networks: &[Network],
    machine: &str,
) -> std::result::Result<Vec<Network>, String> {
    if networks.len() > 1 && networks.contains(&Network::None) {
        return Err(
            "--net none says that there is no network: leave the other --net out".to_owned(),
        );
    }
    let (mut macs, mut taps, mut ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    let mut resolved = networks.to_vec();
    for (index, network) in (0..).zip(&mut resolved) {
        if let Some(card) = network.card() {
            let mac = card.mac.get_or_insert_with(|| Mac::of(machine, index));
            if !macs.insert(*mac) {
                return Err(format!(
                    "--net: two cards have the address {mac}: change a mac="
                ));
            }
        }
        match network {
            Network::Tap { name, .. } if !taps.insert(name.clone()) => {
                return Err(format!(
                    "--net tap={name} is there twice: each card needs a tap of its own"
                ));
            }
            Network::User { forwards, .. } => {
                for Forward { host, .. } in forwards {
                    if !ports.insert(*host) {
                        return Err(format!(
                            "--net user: hostfwd={host}: forwards the host's port {host} a second time"
                        ));
                    }
                }
            }
            _ => {}
        }
    }
    Ok(resolved)
}

/// Network cards whose backends are there, or at least on their way.
pub(super) struct Cards(Vec<(Card, Wire)>);

enum Wire {
    Tap(Tap),
    Passt(Passt),
}

impl Cards {
    /// Opens the taps and starts passt, for networks that have been resolved.
    ///
    /// # Errors
    /// One sentence that says what to do.
    pub(super) fn open(networks: &[Network]) -> Result<Cards> {
        let mut cards = Vec::new();
        for network in networks {
            match network {
                Network::None => {}
                Network::Tap { name, queues, card } => {
                    cards.push((card.clone(), Wire::Tap(Tap::open(name, *queues)?)));
                }
                Network::User { forwards, card } => {
                    cards.push((card.clone(), Wire::Passt(Passt::start(forwards)?)));
                }
            }
        }
        Ok(Cards(cards))
    }

    /// The devices. Each passt has some time to start between [`Cards::open`] and this, or is given it here.
    ///
    /// # Errors
    /// When a passt has ended, with what it said.
    pub(super) fn into_devices(self) -> Result<Vec<Box<dyn VirtioDevice>>> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        for (index, (card, wire)) in (0..).zip(self.0) {
            let Some(mac) = card.mac else {
                continue;
            };
            let backend: Box<dyn NetBackend> = match wire {
                Wire::Tap(tap) => Box::new(tap),
                Wire::Passt(mut passt) => {
                    passt.settle()?;
                    Box::new(passt)
                }
            };
            let net = Net::new(index, mac, backend)
                .on_own_worker(card.own_worker)
                .limited(card.limits)
                .map_err(|error| format!("cannot limit the rate of a network card: {error}"))?;
            devices.push(Box::new(net));
        }
        Ok(devices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_read_and_shown_in_the_same_words() {
        for text in [
            "none",
            "user",
            "user,hostfwd=2222:22,hostfwd=8080:80",
            "user,hostfwd=2222:22,mac=02:00:00:00:00:01",
            "tap=tap0",
            "tap=tap0,queues=4,mac=02:00:00:00:00:01",
            "tap=tap0,bw=1000,iops=20,worker=own",
            "user,worker=own",
        ] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
        assert_eq!(
            parse("tap=t,queues=1").unwrap().to_string(),
            "tap=t",
            "one is what there is anyway"
        );
        let network = parse("user,iops=5,bw=2K,worker=shared").unwrap();
        assert_eq!(network.to_string(), "user,bw=2048,iops=5");
    }

    #[test]
    fn what_is_not_a_network_is_refused_with_what_is() {
        for (text, words) in [
            ("", KINDS),
            ("bridge", KINDS),
            ("user=3", KINDS),
            ("tap", "tap=NAME"),
            ("tap=", "give the name"),
            ("tap=a-name-that-is-too-long", "at most 15 characters"),
            ("tap=t,queues=0", "1 to 16 queues"),
            ("tap=t,queues=17", "1 to 16 queues"),
            ("tap=t,queues=many", "1 to 16 queues"),
            ("tap=t,hostfwd=1:2", "queues=N, mac=MAC, bw=RATE"),
            ("tap=t,", "queues=N, mac=MAC, bw=RATE"),
            ("tap=t,mac=01:00:5e:00:00:01", "multicast"),
            ("tap=t,mac=1", "is not a MAC address"),
            ("user,queues=2", "hostfwd=HOST:GUEST, mac=MAC"),
            ("user,hostfwd", "hostfwd=HOST:GUEST, mac=MAC"),
            ("user,hostfwd=22", "two TCP ports"),
            ("user,hostfwd=0:22", "two TCP ports"),
            ("user,hostfwd=22:65536", "two TCP ports"),
            ("user,hostfwd=1:2:3", "two TCP ports"),
            ("user,worker=mine", "a worker is own"),
            ("user,worker", "worker=own|shared"),
            ("user,bw=fast", "`fast` is not a rate"),
            ("tap=t,iops=0", "`0` is not a number"),
            ("none,mac=02:00:00:00:00:01", "no options"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn cards_get_addresses_by_the_machines_name_and_must_go_together() {
        let all = |texts: &[&str]| {
            let networks: Vec<Network> = texts.iter().map(|text| parse(text).unwrap()).collect();
            resolve(&networks, "vm")
        };
        let shown: Vec<String> = all(&["user", "tap=t,mac=02:00:00:00:00:01", "user"])
            .unwrap()
            .iter()
            .map(Network::to_string)
            .collect();
        let expected = [
            format!("user,mac={}", Mac::of("vm", 0)),
            "tap=t,mac=02:00:00:00:00:01".to_owned(),
            format!("user,mac={}", Mac::of("vm", 2)),
        ];
        assert_eq!(shown, expected);
        assert_eq!(all(&["none"]), Ok(vec![Network::None]));
        assert_eq!(all(&[]), Ok(Vec::new()));
        for (texts, words) in [
            (&["none", "user"][..], "no network"),
            (&["tap=t", "tap=t"], "tap of its own"),
            (&["user,hostfwd=1:2,hostfwd=1:3"], "a second time"),
            (&["user,hostfwd=1:2", "user,hostfwd=1:3"], "a second time"),
            (
                &["user,mac=02:00:00:00:00:01", "tap=t,mac=02:00:00:00:00:01"],
                "two cards",
            ),
        ] {
            let error = all(texts).unwrap_err();
            assert!(error.contains(words), "{texts:?}: {error}");
        }
    }
}
