"""Devices elsewhere: bundles measured over the user's own ssh."""

from __future__ import annotations

from .check import Check, check_device
from .known import DIRECTORY, Device, add_device, devices_file, find_device, known_devices
from .remote import greet, measured_on
from .ssh import Link, connected

__all__ = [
    "DIRECTORY",
    "Check",
    "Device",
    "Link",
    "add_device",
    "check_device",
    "connected",
    "devices_file",
    "find_device",
    "greet",
    "known_devices",
    "measured_on",
]
