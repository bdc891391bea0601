"""How many fields a protobuf message has, counted before it is parsed.

protobuf makes an object of each field while no other thread of Python runs: 8 MiB of texts of no characters are 4
million fields, which held the event loop for over a second on a busy machine.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import Default

from starling.engine_ext.front.bounds import FIELDS

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
"""Kinds of fields on the wire (protobuf's encoding); 3 and 4 are groups, which no message of starling.v1 has."""


def method_of(path: str) -> MethodDescriptor | None:
    """The method of a call's path, "/package.Service/Method"; None: no generated code of this process has it."""
    service, _, method = path.removeprefix("/").partition("/")
    try:
        return Default().FindServiceByName(service).methods_by_name.get(method)
    except KeyError:
        return None


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number on the wire, and where the next field begins.

    Raises:
        IndexError: the data end before it does.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def check_num_fields(data: bytes, message: Descriptor) -> None:
    """Check how many fields a message and those in it have. Packed numbers, and an entry of a map, are one field.

    What is no message is left to the parser, which says so.

    Raises:
        VLLMValidationError: there are more than FIELDS.
    """
    if len(data) <= 2 * FIELDS.limit:  # a field has two bytes at least
        return
    count, left = 0, [(0, len(data), message)]
    try:
        while left:
            at, end, kind = left.pop()
            while at < end:
                count += 1
                if count > FIELDS.limit:
                    FIELDS.check(count)
                tag, at = varint(data, at)
                wire = tag & 7
                if wire == VARINT:
                    _, at = varint(data, at)
                elif wire == LENGTH:
                    size, at = varint(data, at)
                    inner = inner_message(kind, tag >> 3)
                    if inner is not None:
                        left.append((at, at + size, inner))
                    at += size
                elif wire in (FIXED64, FIXED32):
                    at += 8 if wire == FIXED64 else 4
                else:
                    return
    except IndexError:
        return


def inner_message(message: Descriptor, number: int) -> Descriptor | None:
    """What the field of a number holds, if it is a message and no entry of a map."""
    field = message.fields_by_number.get(number)
    if field is None or field.type != FieldDescriptor.TYPE_MESSAGE or field.message_type.GetOptions().map_entry:
        return None
    inner: Descriptor = field.message_type
    return inner
