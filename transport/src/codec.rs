//! Values to bytes and back, for the payloads of sections: the one place that knows bincode. Never used for pages.

use bincode::config;
use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

/// The most a value may take, in bytes: longer ones travel in several sections, and files hold them whole.
pub const LIMIT: usize = 256 << 20;

/// Why a value could not be coded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// It does not encode.
    #[error("cannot encode {what}: {detail}")]
    Encode {
        /// The type.
        what: &'static str,
        /// Why.
        detail: String,
    },
    /// The bytes are not one.
    #[error("the peer sent a damaged {what}: {detail}")]
    Decode {
        /// The type.
        what: &'static str,
        /// Why.
        detail: String,
    },
}

/// Little-endian, variable-length integers; lengths are charged against the limit before they are allocated.
fn layout() -> config::Configuration<config::LittleEndian, config::Varint, config::Limit<LIMIT>> {
    config::standard().with_limit::<LIMIT>()
}

/// The bytes of a value.
pub fn encode<T: Serialize>(value: &T) -> Result<Bytes, CodecError> {
    let failed = |e: bincode::error::EncodeError| CodecError::Encode {
        what: std::any::type_name::<T>(),
        detail: e.to_string(),
    };
    let bytes = bincode::serde::encode_to_vec(value, layout()).map_err(failed)?;
    // What could not be read back is not written.
    if bytes.len() > LIMIT {
        return Err(CodecError::Encode {
            what: std::any::type_name::<T>(),
            detail: format!("{} bytes, more than the {LIMIT} that can be read back", bytes.len()),
        });
    }
    Ok(Bytes::from(bytes))
}

/// The value of some bytes, all of them.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let failed = |detail: String| CodecError::Decode {
        what: std::any::type_name::<T>(),
        detail,
    };
    match bincode::serde::decode_from_slice(bytes, layout()) {
        Ok((value, used)) if used == bytes.len() => Ok(value),
        Ok((_, used)) => Err(failed(format!("{} bytes are left over", bytes.len() - used))),
        Err(e) => Err(failed(e.to_string())),
    }
}
