/**
 * Finds possible duplicates: rows that have the same email address, phone number or reference id.
 * Square does not look for them. It creates a second profile with the same values without an error.
 *
 * The table can hold a million customers, while a push has only a few rows. So the index is created
 * with the values that will be searched for, and keeps only the rows that have one of these. The
 * caller can then add the whole table, one row after the other.
 */
import { removeTrunkZero, unifyDashes } from "./normalize.ts";

/**
 * The values that identify a customer, cleaned as for sending. An invalid value, which a customer
 * of Square can have, is only trimmed. An empty text means blank.
 */
export interface ComparedValues {
  emailAddress: string;
  phoneNumber: string;
  referenceId: string;
}

/** A row of the table with its compared values. */
export interface Candidate extends ComparedValues {
  /** A text, because a row number of SQLite can be larger than a safe integer. */
  localId: string;
  /** Square's customer id, or null for a row that is not in Square yet. */
  id: string | null;
}

/** A row that has the same value as the row that was searched for. */
export interface Match {
  /** The field in which both have the value. */
  field: keyof ComparedValues;
  localId: string;
  id: string | null;
}

export interface DuplicateIndex {
  /** Adds a row. A row without one of the wanted values is not kept. */
  add(candidate: Candidate): void;
  /**
   * Finds the first other row with the same email address, phone number or reference id.
   * @param options.ignoredReference the reference id with which a candidate was sent whose outcome
   *   is unknown. If Square has created the candidate, a pull may have saved the customer as
   *   another row with this reference id. That row is not a duplicate, so it is ignored
   */
  find(candidate: Candidate, options?: { ignoredReference?: string }): Match | undefined;
}

/** A value in the form in which it is compared. */
interface IndexedValue {
  field: keyof ComparedValues;
  /** Equal values have equal buckets. Different values can share a bucket, so compare them too. */
  bucket: string;
  value: string;
}

interface Entry {
  localId: string;
  id: string | null;
  value: string;
  /** The reference id of the row, in the form in which it is compared. */
  reference: string;
}

/** @param wanted the values that will be searched for */
export function createDuplicateIndex(wanted: Iterable<ComparedValues>): DuplicateIndex {
  const buckets = new Map<string, Entry[]>();
  for (const comparedValues of wanted)
    for (const { bucket } of listIndexedValues(comparedValues)) buckets.set(bucket, []);

  function add(candidate: Candidate): void {
    const { localId, id } = candidate;
    const reference = foldText(candidate.referenceId);
    for (const { bucket, value } of listIndexedValues(candidate))
      buckets.get(bucket)?.push({ localId, id, value, reference });
  }

  function find(
    candidate: Candidate,
    { ignoredReference = "" }: { ignoredReference?: string } = {},
  ): Match | undefined {
    const ignored = foldText(ignoredReference);
    for (const { field, bucket, value } of listIndexedValues(candidate))
      for (const entry of buckets.get(bucket) ?? []) {
        const isItself = entry.localId === candidate.localId;
        const isIgnored = ignored !== "" && entry.reference === ignored;
        if (!isItself && !isIgnored && isSameValue(field, entry.value, value))
          return { field, localId: entry.localId, id: entry.id };
      }
    return undefined;
  }

  return { add, find };
}

// One of two equal phone numbers can lack the country code: 2065550100 and +12065550100. So two
// numbers are the same if one ends with the other. Their last nine digits are their bucket. Shorter
// numbers are local ones, which different customers can have, so they are not compared.
const MIN_PHONE_DIGITS = 9;

// In many countries, a national number begins with a 0, the trunk prefix: 020 7946 0958. That 0 is
// not dialled after a country code, but people write it there: +44 020 7946 0958. This pattern
// finds a 0 after the codes of countries where such a 0 is never part of the number. Italy (39) is
// not in the list. The 0 is ignored only in the comparison. The number is sent as it was written.
const TRUNK_ZERO =
  /^(\+(?:27|3[123]|353|358|41|43|44|46|49|61|62|63|64|66|81|82|84|86|90|91|92|94))[\s.-]*0/;

/** Lists the values of a row that can be compared. Blank ones are left out. */
function listIndexedValues({
  emailAddress,
  phoneNumber,
  referenceId,
}: ComparedValues): IndexedValue[] {
  const values: IndexedValue[] = [];
  const email = foldText(emailAddress);
  if (email !== "") values.push({ field: "emailAddress", bucket: `email ${email}`, value: email });

  const phone = readSignificantDigits(phoneNumber);
  if (phone.length >= MIN_PHONE_DIGITS) {
    const bucket = `phone ${phone.slice(-MIN_PHONE_DIGITS)}`;
    values.push({ field: "phoneNumber", bucket, value: phone });
  }

  const reference = foldText(referenceId);
  if (reference !== "")
    values.push({ field: "referenceId", bucket: `reference ${reference}`, value: reference });
  return values;
}

/**
 * Returns the digits of a phone number without its prefixes: the trunk prefix 0, and the 00 in
 * front of a country code.
 */
function readSignificantDigits(phoneNumber: string): string {
  // removeTrunkZero removes a (0) in brackets, TRUNK_ZERO finds a 0 without brackets.
  const withoutTrunkZero = removeTrunkZero(phoneNumber).replace(TRUNK_ZERO, "$1");
  const fromFirstDigit = withoutTrunkZero.replace(/^[^1-9]+/, "");
  return fromFirstDigit.replace(/[^0-9]/g, "");
}

function isSameValue(field: keyof ComparedValues, one: string, other: string): boolean {
  if (field === "phoneNumber") return one.endsWith(other) || other.endsWith(one);
  return one === other;
}

/**
 * Returns a text in the form in which it is compared. Case does not count, because Square's search
 * ignores it. Texts that only look the same become equal, for example an é of one and of two
 * characters, or an en dash and a hyphen. If two different values become equal by mistake, a row
 * only waits for a person.
 */
function foldText(text: string): string {
  return unifyDashes(text.normalize("NFKC")).toLowerCase();
}
