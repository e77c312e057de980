/**
 * Finds possible duplicates: rows that have the same email address, phone number or reference id. Square
 * does not look for them itself: it creates a second profile with the same values without an error.
 *
 * The table can hold a million customers and a push a few rows. So the index is told first which values
 * are wanted and then keeps only the rows that have one of these. The caller can stream the table.
 */
import { removeTrunkZero, unifyDashes } from "./normalize.ts";

/** What identifies a customer, cleaned as it is sent to Square. An empty text means blank. */
export interface Contacts {
  emailAddress: string;
  phoneNumber: string;
  referenceId: string;
}

/** A row of the table with its contacts. */
export interface Candidate extends Contacts {
  /** A text, because a row number of SQLite can be larger than a safe integer. */
  localId: string;
  /** Square's customer id, or null for a row that is not in Square yet. */
  id: string | null;
}

/** The row that has the same value as another one, and the field in which. */
export interface Match {
  field: keyof Contacts;
  localId: string;
  id: string | null;
}

export interface DuplicateIndex {
  /** Adds a row, if it has one of the wanted values. */
  add(candidate: Candidate): void;
  /**
   * Finds the first other row with the same email address, phone number or reference id.
   * @param ignoredReference rows with this reference id do not count. For a row in doubt it is the
   * reference id that the row was sent with: the row that has the same one can be the customer that was
   * created from it, and a row must not be on hold because of itself.
   */
  find(candidate: Candidate, ignoredReference?: string): Match | undefined;
}

interface Key {
  field: keyof Contacts;
  /** Under what the value is stored. Equal values have equal buckets, different ones can share one. */
  bucket: string;
  value: string;
}

interface Entry {
  localId: string;
  id: string | null;
  value: string;
  reference: string;
}

/** @param wanted the contacts that will be searched for */
export function createDuplicateIndex(wanted: Iterable<Contacts>): DuplicateIndex {
  const buckets = new Map<string, Entry[]>();
  for (const contacts of wanted)
    for (const { bucket } of buildKeys(contacts)) buckets.set(bucket, []);

  function add(candidate: Candidate): void {
    const { localId, id, referenceId } = candidate;
    for (const { bucket, value } of buildKeys(candidate))
      buckets.get(bucket)?.push({ localId, id, value, reference: foldText(referenceId) });
  }

  function find(candidate: Candidate, ignoredReference = ""): Match | undefined {
    const ignored = foldText(ignoredReference);
    for (const { field, bucket, value } of buildKeys(candidate))
      for (const entry of buckets.get(bucket) ?? []) {
        const isItself = entry.localId === candidate.localId;
        const isIgnored = ignored !== "" && entry.reference === ignored;
        if (isItself || isIgnored || !isSame(field, entry.value, value)) continue;
        return { field, localId: entry.localId, id: entry.id };
      }
    return undefined;
  }

  return { add, find };
}

// The country code can be missing on either side, so two phone numbers are the same if one ends with the
// other. They share the bucket of their last nine digits.
const SHORTEST_PHONE = 9;

// Some write the trunk prefix 0 after the country code without brackets: +44 020. It is ignored for the comparison
// only, in countries that have this prefix and whose numbers do not begin with a 0.
const TRUNK_ZERO =
  /^(\+(?:27|3[123]|353|358|41|43|44|46|49|61|62|63|64|66|81|82|84|86|90|91|92|94))[\s.-]*0/;

function buildKeys({ emailAddress, phoneNumber, referenceId }: Contacts): Key[] {
  const keys: Key[] = [];
  const email = foldText(emailAddress);
  if (email !== "") keys.push({ field: "emailAddress", bucket: `email ${email}`, value: email });

  // Without the trunk prefix 0 of a national number and the prefix 00 of an international one.
  const phone = removeTrunkZero(phoneNumber)
    .replace(TRUNK_ZERO, "$1")
    .replace(/^[^1-9]+|[^0-9]/g, "");
  if (phone.length >= SHORTEST_PHONE) {
    const bucket = `phone ${phone.slice(-SHORTEST_PHONE)}`;
    keys.push({ field: "phoneNumber", bucket, value: phone });
  }

  const reference = foldText(referenceId);
  if (reference !== "")
    keys.push({ field: "referenceId", bucket: `reference ${reference}`, value: reference });
  return keys;
}

function isSame(field: keyof Contacts, one: string, other: string): boolean {
  return field === "phoneNumber" ? one.endsWith(other) || other.endsWith(one) : one === other;
}

// Square's search ignores case. Texts that only look the same, such as an é of one or of two characters
// or a reference id with an en dash, are treated as equal too: at worst a row waits for a person.
function foldText(text: string): string {
  return unifyDashes(text.normalize("NFKC")).toLowerCase();
}
