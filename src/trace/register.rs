//! Names for registers and their bits, as their specifications write them.
//!
//! Every device keeps its registers as `const` tables of these, so that one table serves the trace,
//! the register dump and the reader of the source.

use std::fmt;

/// One bit or bit field of a register.
#[derive(Debug, PartialEq, Eq)]
pub struct Field {
    /// The bits that belong to the field.
    pub mask: u64,
    pub name: &'static str,
}

/// A device register: its name, and the fields worth naming.
#[derive(Debug, PartialEq, Eq)]
pub struct Register {
    pub name: &'static str,
    pub fields: &'static [Field],
}

impl Register {
    /// A register whose value is just a number.
    pub const fn plain(name: &'static str) -> Register {
        Register { name, fields: &[] }
    }

    /// Displays as the name with the fields that are not zero in `value`: `LSR{THRE,TEMT}`.
    pub fn with_value(&self, value: u64) -> impl fmt::Display + '_ {
        WithValue {
            register: self,
            value,
        }
    }
}

struct WithValue<'a> {
    register: &'a Register,
    value: u64,
}

impl fmt::Display for WithValue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.register.name)?;
        let mut separator = '{';
        for field in self
            .register
            .fields
            .iter()
            .filter(|field| self.value & field.mask != 0)
        {
            write!(f, "{separator}{}", field.name)?;
            // A one-bit field is its name; a wider one also has a value.
            if field.mask.count_ones() > 1 {
                write!(
                    f,
                    "={:#x}",
                    (self.value & field.mask) >> field.mask.trailing_zeros()
                )?;
            }
            separator = ',';
        }
        if separator == ',' {
            f.write_str("}")
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LCR: Register = Register {
        name: "LCR",
        fields: &[
            Field {
                mask: 0x03,
                name: "WLS",
            },
            Field {
                mask: 0x80,
                name: "DLAB",
            },
        ],
    };

    #[test]
    fn only_fields_that_are_set_are_printed_and_wide_ones_with_their_value() {
        assert_eq!(LCR.with_value(0x83).to_string(), "LCR{WLS=0x3,DLAB}");
        assert_eq!(LCR.with_value(0x10).to_string(), "LCR");
        assert_eq!(Register::plain("SCR").with_value(7).to_string(), "SCR");
    }
}
