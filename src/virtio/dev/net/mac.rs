//! MAC addresses of network cards (IEEE 802, clause 8).

use std::fmt;
use std::str::FromStr;

/// First byte, bit 0: the address of a group, which no card has.
const GROUP: u8 = 1 << 0;
/// First byte, bit 1: made up locally, not bought from the IEEE.
const LOCAL: u8 = 1 << 1;

/// FNV-1a with 64 bits (draft-eastlake-fnv, section 2): the start and the prime.
const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// The address of one network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac([u8; 6]);

impl Mac {
    /// The address of card number `index` of the machine called `name`: always the same one, so that a guest's network
    /// set-up stays good from run to run, and hardly ever that of a machine with another name.
    ///
    /// It is the low 48 bits of the FNV-1a hash of the name's bytes, a zero byte, and the index as four bytes
    /// little-endian; low byte first; then the first byte's bits for "group" cleared and "local" set.
    pub fn of(name: &str, index: u32) -> Mac {
        let hash = name
            .bytes()
            .chain([0])
            .chain(index.to_le_bytes())
            .fold(FNV_OFFSET, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(FNV_PRIME)
            });
        let [first, b, c, d, e, f, ..] = hash.to_le_bytes();
        Mac([(first & !GROUP) | LOCAL, b, c, d, e, f])
    }

    /// The six bytes, in the order in which they go over the wire.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    /// Parses six bytes of two hexadecimal digits, with colons between them.
    fn from_str(text: &str) -> Result<Mac, String> {
        let mut bytes = [0; 6];
        let mut words = text.split(':');
        for byte in &mut bytes {
            *byte = words
                .next()
                .filter(|word| word.len() == 2 && word.chars().all(|c| c.is_ascii_hexdigit()))
                .and_then(|word| u8::from_str_radix(word, 16).ok())
                .ok_or_else(|| not_an_address(text))?;
        }
        if words.next().is_some() {
            return Err(not_an_address(text));
        }
        let [first, ..] = bytes;
        if first & GROUP != 0 {
            return Err(format!(
                "{text} is the address of a group (multicast), not of a card: its first byte must be even"
            ));
        }
        if bytes == [0; 6] {
            return Err(format!(
                "{text} is no card's address: write one like 02:00:00:00:00:01"
            ));
        }
        Ok(Mac(bytes))
    }
}

fn not_an_address(text: &str) -> String {
    format!("`{text}` is not a MAC address: write one like 02:00:00:00:00:01")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_keeps_its_address_and_shares_it_with_no_other() {
        assert_eq!(Mac::of("sarang", 0), Mac::of("sarang", 0));
        assert_eq!(Mac::of("sarang", 0).to_string(), EXPECTED);
        let mut seen = std::collections::HashSet::new();
        for name in ["", "sarang", "sarang2", "vm", "vm\u{1}", "손님"] {
            for index in 0..64 {
                let mac = Mac::of(name, index);
                assert!(seen.insert(mac), "{name} {index}");
                assert_eq!(mac.bytes()[0] & 3, 2, "unicast and local");
                assert_eq!(mac.to_string().parse(), Ok(mac));
            }
        }
    }

    /// Worked out apart from this code by the documented recipe: it may never change.
    const EXPECTED: &str = "16:1f:b0:ef:d9:4a";

    #[test]
    fn what_is_not_a_cards_address_is_refused_with_a_sentence() {
        for (text, words) in [
            ("", "is not a MAC address"),
            ("02:00:00:00:00", "is not a MAC address"),
            ("02:00:00:00:00:01:02", "is not a MAC address"),
            ("2:0:0:0:0:1", "is not a MAC address"),
            ("02:00:00:00:00:+1", "is not a MAC address"),
            ("01:00:5e:00:00:01", "multicast"),
            ("ff:ff:ff:ff:ff:ff", "multicast"),
            ("00:00:00:00:00:00", "no card's address"),
        ] {
            let error = text.parse::<Mac>().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert_eq!(
            "AA:bb:0C:00:00:01".parse::<Mac>().unwrap().to_string(),
            "aa:bb:0c:00:00:01"
        );
    }
}
