//! Reads the first directory of a TIFF file (TIFF 6.0, section 2; BigTIFF). EXIF data is a TIFF file too.

/// The fields of a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Directory<'a> {
    file: &'a [u8],
    order: Order,
    /// Whether offsets and counts have eight bytes (BigTIFF).
    is_big: bool,
    /// The data after the number of fields.
    fields: &'a [u8],
    count: u64,
}

/// Byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Low,
    High,
}

impl Order {
    fn number(self, bytes: &[u8]) -> u64 {
        let join = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        match self {
            Self::High => bytes.iter().fold(0, join),
            Self::Low => bytes.iter().rev().fold(0, join),
        }
    }
}

/// A field of a directory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field<'a> {
    kind: u64,
    order: Order,
    data: &'a [u8],
}

impl<'a> Directory<'a> {
    /// The first directory of a file; `None` if the file is not a TIFF.
    pub(crate) fn first(file: &'a [u8]) -> Option<Self> {
        // Two of these have their bytes swapped by mistake, but other programs accept them.
        let (order, is_big) = match file.get(..4)? {
            b"II*\0" | b"II\0*" => (Order::Low, false),
            b"MM\0*" | b"MM*\0" => (Order::High, false),
            b"II+\0" => (Order::Low, true),
            b"MM\0+" => (Order::High, true),
            _ => return None,
        };
        let (position, width) = if is_big { (file.get(8..16)?, 8) } else { (file.get(4..8)?, 2) };
        let directory = file.get(usize::try_from(order.number(position)).ok()?..)?;
        let (count, fields) = directory.split_at_checked(width)?;
        Some(Self { file, order, is_big, fields, count: order.number(count) })
    }

    /// The first field with this tag whose data is not cut off.
    pub(crate) fn find(&self, tag: u16) -> Option<Field<'a>> {
        let (width, inline) = if self.is_big { (20, 8) } else { (12, 4) };
        let fields = self.fields.chunks_exact(width).take(usize::try_from(self.count).unwrap_or(usize::MAX));
        let mut named = fields.filter(|field| self.order.number(&field[..2]) == u64::from(tag));
        named.find_map(|field| {
            let kind = self.order.number(&field[2..4]);
            let value = &field[width - inline..];
            let count = self.order.number(&field[4..width - inline]);
            let size = usize::try_from(count.checked_mul(size_of(kind)?)?).ok()?;
            let data = match value.get(..size) {
                Some(data) => data,
                None => self.file.get(usize::try_from(self.order.number(value)).ok()?..)?.get(..size)?,
            };
            (!data.is_empty()).then_some(Field { kind, order: self.order, data })
        })
    }
}

/// Size of a value of this type, in bytes.
fn size_of(kind: u64) -> Option<u64> {
    match kind {
        1 | 2 | 6 | 7 => Some(1),
        3 | 8 => Some(2),
        4 | 9 | 11 | 13 => Some(4),
        5 | 10 | 12 | 16 => Some(8),
        _ => None,
    }
}

impl<'a> Field<'a> {
    /// Its first value, if that is a non-negative whole number. Bytes and text don't count as numbers.
    pub(crate) fn number(&self) -> Option<u64> {
        let value = &self.data[..usize::try_from(size_of(self.kind)?).ok()?];
        let number = self.order.number(value);
        match self.kind {
            3 | 4 | 13 | 16 => Some(number),
            // Negative numbers have their highest bit set.
            6 | 8 | 9 => Some(number).filter(|number| number >> (8 * value.len() - 1) == 0),
            5 | 10 => {
                let (above, below) = (self.order.number(&value[..4]), self.order.number(&value[4..]));
                (below > 0 && above.is_multiple_of(below)).then(|| above / below)
            }
            11 => whole(f64::from(f32::from_bits(number as u32))),
            12 => whole(f64::from_bits(number)),
            _ => None,
        }
    }

    /// Its bytes, if it holds bytes.
    pub(crate) fn bytes(&self) -> Option<&'a [u8]> {
        matches!(self.kind, 1 | 7).then_some(self.data)
    }
}

fn whole(number: f64) -> Option<u64> {
    (number.fract() == 0.0 && (0.0..=1e9).contains(&number)).then_some(number as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file whose directory has one field, with its value inline or right after the directory.
    fn file(order: Order, kind: u16, count: u32, value: &[u8]) -> Vec<u8> {
        let two = |n: u16| if order == Order::Low { n.to_le_bytes() } else { n.to_be_bytes() };
        let four = |n: u32| if order == Order::Low { n.to_le_bytes() } else { n.to_be_bytes() };
        let mark = if order == Order::Low { *b"II" } else { *b"MM" };
        let (mut inline, mut apart) = (value.to_vec(), Vec::new());
        if value.len() > 4 {
            inline = four(26).to_vec();
            apart = value.to_vec();
        }
        inline.resize(4, 0);
        let field = [&two(274)[..], &two(kind), &four(count), &inline].concat();
        [&mark[..], &two(42), &four(8), &two(1), &field, &four(0), &apart].concat()
    }

    fn number(file: &[u8]) -> Option<u64> {
        Directory::first(file)?.find(274)?.number()
    }

    #[test]
    fn numbers_of_every_type_are_read_in_either_byte_order_but_bytes_are_not() {
        for order in [Order::Low, Order::High] {
            let ordered = |mut bytes: Vec<u8>| {
                if order == Order::High {
                    bytes.reverse();
                }
                bytes
            };
            let six = |width: usize| ordered((0..width).map(|i| if i == 0 { 6 } else { 0 }).collect());
            for (kind, width) in [(3, 2), (8, 2), (4, 4), (9, 4), (13, 4), (16, 8), (6, 1)] {
                assert_eq!(number(&file(order, kind, 1, &six(width))), Some(6), "type {kind}");
            }
            assert_eq!(number(&file(order, 5, 1, &[six(4), ordered(vec![2, 0, 0, 0])].concat())), Some(3));
            assert_eq!(number(&file(order, 11, 1, &ordered(6f32.to_le_bytes().to_vec()))), Some(6));
            assert_eq!(number(&file(order, 12, 1, &ordered(6f64.to_le_bytes().to_vec()))), Some(6));
            assert_eq!(number(&file(order, 3, 4, &six(2).repeat(4))), Some(6), "the first of several values");
            for kind in [1, 2, 7] {
                assert_eq!(number(&file(order, kind, 1, &[6])), None, "type {kind}");
            }
            assert_eq!(number(&file(order, 9, 1, &[0xFF; 4])), None);
        }
    }

    #[test]
    fn damaged_fields_are_ignored() {
        let whole = file(Order::Low, 4, 9, &[6; 36]);
        assert!(number(&whole).is_some());
        for end in 0..whole.len() {
            assert_eq!(number(&whole[..end]), None, "to {end}");
        }
        assert_eq!(number(&file(Order::Low, 3, u32::MAX, &[6, 0])), None);
        assert_eq!(number(&file(Order::Low, 99, 1, &[6, 0])), None);
        assert_eq!(number(&file(Order::Low, 5, 1, &[6, 0, 0, 0, 0, 0, 0, 0])), None, "a denominator of zero");
    }
}
