//! Plain types to bytes and back: the engine's only use of bincode.
//!
//! Sections carry `(kind, version)` beside the payload, so that a reader refuses what it does not know before it decodes anything.
//! Decoding is limited to [`LIMIT`] bytes of claimed lengths: a damaged or hostile payload cannot make it allocate more.

use serde::{Serialize, de::DeserializeOwned};

/// The most a decoded section may claim, in bytes.
pub const LIMIT: usize = 256 << 20;

/// Why bytes are not a section.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The decoder's reason.
    #[error("malformed section: {0}")]
    Malformed(String),
    /// Bytes follow the value.
    #[error("malformed section: {0} bytes follow the value")]
    Trailing(usize),
}

fn config() -> bincode::config::Configuration<bincode::config::LittleEndian, bincode::config::Varint, bincode::config::Limit<LIMIT>> {
    bincode::config::standard().with_limit::<LIMIT>()
}

/// Encodes a value.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(value, config()).map_err(|e| CodecError::Malformed(e.to_string()))?;
    // What could not be read back is not written.
    if bytes.len() > LIMIT {
        return Err(CodecError::Malformed(format!(
            "{} bytes, more than the {LIMIT} that can be read back",
            bytes.len()
        )));
    }
    Ok(bytes)
}

/// Decodes a value that fills `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, config()).map_err(|e| CodecError::Malformed(e.to_string()))?;
    if used != bytes.len() {
        return Err(CodecError::Trailing(bytes.len() - used));
    }
    Ok(value)
}
